"""Scores to keep mask. NumPy only: no model, no GPU, no framework."""
