"""Evaluation: from a dataset to named numbers."""
