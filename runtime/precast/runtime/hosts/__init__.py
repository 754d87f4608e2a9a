"""What this machine is, and which variant of an artifact runs on it."""
