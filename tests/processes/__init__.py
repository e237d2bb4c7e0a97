"""Runs of several processes, which torchrun starts."""
