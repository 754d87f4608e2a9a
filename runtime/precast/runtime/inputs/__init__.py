"""Tokenizing, checking, aligning and padding the caller's inputs."""
