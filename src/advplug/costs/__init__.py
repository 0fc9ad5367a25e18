"""What a matrix costs: forecast, timed on this machine, and held within what it may spend."""
