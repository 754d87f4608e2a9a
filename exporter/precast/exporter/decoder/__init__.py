"""Decoders: tokens one after the other, with caches of what came before."""
