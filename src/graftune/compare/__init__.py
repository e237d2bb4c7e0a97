"""Many methods, one budget, one report."""
