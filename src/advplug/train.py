"""The one supervised training loop."""
