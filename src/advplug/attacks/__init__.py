"""Attack kernels: what the registered attacks are made of. Needs torch."""
