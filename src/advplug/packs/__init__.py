"""Defended models as files to deploy: written, checked, run."""
