"""Matrices written as files: read, checked, planned, and the names that they give."""
