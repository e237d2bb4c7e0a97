"""Whole jobs, as people do them, on tiny models."""
