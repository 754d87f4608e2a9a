"""Encoders: all of the input at once, one forward pass."""
