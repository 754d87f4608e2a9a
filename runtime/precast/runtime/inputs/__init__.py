"""What the caller gives, as arrays of the compiled sizes."""
