"""Defense kernels: what the registered defenses are made of. Needs torch."""
