"""What is taken where nothing is said, by the command line and beneath it. Imports nothing, so that --help can tell."""

OUTPUT = "advplug-results"
"""The folder that keeps results."""

CRAFTED_BY = "pgd:steps=40"
"""The attack that crafts the images of a transfer attack."""

SPEC = "spec.yaml"
"""The file in that folder that says what was asked for."""
