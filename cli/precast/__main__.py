"""`python -m precast`: the command line, where its script is not on the path."""

import sys

__all__: list[str] = []

if __name__ == "__main__":
    # Python looks for modules in the current directory first, where a user's own files lie.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]

    from .cli import main

    main()
