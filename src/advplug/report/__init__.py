"""A folder of runs as one page of HTML that needs nothing else."""
