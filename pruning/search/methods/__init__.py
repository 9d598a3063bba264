"""Search methods, one module each, and nothing else."""
