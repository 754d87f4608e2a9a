"""How fast artifacts are, measured in processes of their own, and which lengths to compile for."""
