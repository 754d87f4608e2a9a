"""Where Inductor and the C++ compiler work: their folders and environment, and what is kept for the next export."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch._inductor import cpp_builder
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from precast.runtime.artifact.locks import Scratch
from precast.runtime.artifact.store import home
from precast.runtime.errors import ExportError

from .inductor_patches import leave_out_input_checks, precompile_headers_in

__all__ = ["FOLDER", "check_compiler", "compiler_workspace"]

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Inductor's name for the folder of its files."""

_LEAN = Path(__file__).parent / "lean"
"""Headers that are found before the standard library's."""


def check_compiler() -> None:
    """Raise ExportError, with what to install, where there is no C++ compiler."""
    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        raise ExportError(
            "Native code needs a C++ compiler, and none was found: install g++ (Debian, Ubuntu: apt install g++) or "
            "name one in the environment variable CXX. Running what was compiled needs none."
        ) from error


@contextmanager
def compiler_workspace() -> Iterator[Path]:
    """Within this block Inductor keeps its files in a temporary folder, or in the one that the user set. Yields the
    folder of what is the same for every export: compiled headers and pieces.

    Raises ExportError where there is no compiler.
    """
    check_compiler()
    before = dict(os.environ)
    # Inductor tests what it compiles by `python -c`, which otherwise imports from the current directory (before Python
    # 3.11, which does not know this variable, in any case).
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, [str(_LEAN), before.get("CPLUS_INCLUDE_PATH")]))
    # Inductor itself sets the variable to its default.
    is_set = before.get(FOLDER, default_cache_dir()) != default_cache_dir()
    try:
        with nullcontext(Path(before[FOLDER])) if is_set else Scratch() as folder:
            os.environ[FOLDER] = str(folder)
            kept = Path(folder) if is_set else _kept_folder(Path(folder))
            with precompile_headers_in(kept / "headers"), leave_out_input_checks():
                yield kept
    finally:
        os.environ.clear()
        os.environ.update(before)


def _kept_folder(scratch: Path) -> Path:
    """In precast's cache, which nobody else may write to, as they may to Inductor's in /tmp; or where that cannot be,
    what is gone after the export."""
    folder = home() / "compiler"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return scratch
    return folder if os.access(folder, os.W_OK) else scratch
