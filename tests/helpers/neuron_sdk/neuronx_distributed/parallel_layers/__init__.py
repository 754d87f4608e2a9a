"""A stand-in for NxD's parallel layers."""
