"""Faster forms of equations, each tested against its plain form."""
