"""Measurements: the published recipe and ours side by side, and what survives being killed."""
