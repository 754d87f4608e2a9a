"""Artifacts elsewhere: on the Hub, and what is kept of them on this machine."""
