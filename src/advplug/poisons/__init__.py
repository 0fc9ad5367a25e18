"""Attacks on training data: planned, applied, judged, written as files."""
