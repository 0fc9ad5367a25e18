"""Who trains networks: one process, or several that a launcher started. The loop itself is `advplug.train`."""
