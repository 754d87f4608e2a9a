"""Artifacts on the Hub, and the caches on this machine."""
