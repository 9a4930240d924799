"""Sweeps: the same rows with several settings, see ``sweep.planning`` and ``sweep.running``."""
