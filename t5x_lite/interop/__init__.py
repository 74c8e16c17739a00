"""Weights of other libraries: their files read, and written, without those libraries."""
