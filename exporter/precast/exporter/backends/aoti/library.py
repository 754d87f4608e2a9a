"""ExportedProgram -> one shared library, without weights in it and without traces of where it was built."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor
from torch._inductor import cpp_builder
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from precast.runtime.artifact.locks import Scratch
from precast.runtime.errors import ExportError

from ..aten.kernel_set import Kernels
from ..aten.lowering import Forms
from ..aten.materialize import materialized
from .attention import attend, attend_prompt
from .dequantize import matrix
from .gemv import rows
from .gpu import KERNELS_INSIDE, check_whole
from .inductor_patches import short_ones_alone
from .isa import options_of, products_of

__all__ = ["build", "check_compiler", "forms_of", "names_of", "workspace"]

_SUMS = Forms(materialize=materialized, sums=True, product=torch.bfloat16, functional=False)
_OWN = Kernels(rows, matrix, attend, attend_prompt)
_NARROW = frozenset({torch.bfloat16, torch.float16})


def forms_of(device: str, isa: str) -> Forms:
    """How programs are written. One token: sums that inductor fuses, or kernels of our own where they are faster than
    what it makes. More: matrices, in bfloat16 where weights are codes; on a CPU only in what it multiplies."""
    if device == "cuda":
        return _SUMS
    products = products_of(isa)
    product = torch.bfloat16 if torch.bfloat16 in products else torch.float32
    return replace(_SUMS, kernels=_OWN, product=product, widened=_NARROW - products)


def names_of(forms: Forms) -> str:
    """The dtypes in which matrices may be multiplied, for the record."""
    dtypes = [torch.float32, *sorted(_NARROW - forms.widened, key=str)]
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    # Nothing for debuggers.
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
_KERNELS_IN_CPP: dict[str, Any] = {
    # As many threads as the caller says at run time; a loop too short for two is one's alone.
    "cpp.dynamic_threads": True,
    "cpp.threads": 2,
    # `rows` takes nothing else into its loops.
    "epilogue_fusion": False,
    # A concatenation is computed where it is read.
    "force_pointwise_cat": True,
    # One rounding for a product and a sum instead of two; it is also what the kernels of other backends do.
    "cpp.enable_floating_point_contract_flag": "fast",
}


def build(
    exported: torch.export.ExportedProgram,
    target: Path,
    isa: str,
    device: str = "cpu",
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Compile a program, whose weights are on `device`, to the library `target`, which will need the program's weights
    unless inductor's options in `more` say otherwise. Raises ExportError."""
    kernels = _KERNELS_IN_CPP if device == "cpu" else KERNELS_INSIDE
    with _quiet():
        try:
            files = _compile(exported, {**_OPTIONS, **kernels, **options_of(isa), **more}, device)
        except Exception as error:
            # Inductor and the compiler that it calls fail in many ways.
            raise ExportError(f"AOTInductor cannot compile this model. {_first_line(error)}") from error
    _check_weights(exported, files)
    check_whole(files)
    library = next(Path(file) for file in files if isinstance(file, str) and file.endswith(".so"))
    folders = [os.environ[_FOLDER], os.path.dirname(torch.__file__)]
    target.write_bytes(_without_paths(library.read_bytes(), folders))


_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def workspace() -> Iterator[None]:
    """Where inductor keeps its files meanwhile: a folder that goes away again, or the one that the user set. Raises
    ExportError where there is no compiler."""
    check_compiler()
    # Inductor tries what it compiles by `python -c`, and that imports from the current directory (before Python 3.11,
    # which does not know this variable, in any case).
    with patch.dict(os.environ, {"PYTHONSAFEPATH": "1"}):
        # Inductor itself puts its default there.
        if os.environ.get(_FOLDER, default_cache_dir()) != default_cache_dir():
            yield
            return
        with Scratch() as folder:
            os.environ[_FOLDER] = str(folder)
            yield


def _compile(exported: torch.export.ExportedProgram, options: dict[str, Any], device: str) -> list[Any]:
    arguments, keywords = exported.example_inputs
    with torch.no_grad(), short_ones_alone() if device == "cpu" else nullcontext():
        files: Any = torch._inductor.aot_compile(
            exported.module(check_guards=False), arguments, keywords, options=options
        )
    return list(files)


def _check_weights(exported: torch.export.ExportedProgram, files: list[Any]) -> None:
    """What the library looks up by name are weights of the program: nothing that inductor made of them."""
    known = {*exported.state_dict, *exported.constants}
    for held in files:
        if not isinstance(held, str) and (unknown := sorted(set(held) - known)):
            raise ExportError(
                f"AOTInductor made the constants {', '.join(unknown[:3])} of its own, which are not saved."
            )


def check_compiler() -> None:
    """Raise ExportError, with what to install, where there is no C++ compiler."""
    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        raise ExportError(
            "Native code needs a C++ compiler, and none was found: install g++ (Debian, Ubuntu: apt install g++) or "
            "name one in the environment variable CXX. Running what was compiled needs none."
        ) from error


def _without_paths(library: bytes, folders: list[str]) -> bytes:
    """The library with the names of these folders, which it has in messages and records of its making, blotted out in
    place: nothing that runs depends on them."""
    strip = shutil.which("strip")
    if strip:
        library = _stripped(strip, library)
    for folder in folders:
        library = re.sub(re.escape(folder.encode()), lambda found: b"." * len(found[0]), library)
    return library


def _stripped(strip: str, library: bytes) -> bytes:
    """Without symbols for debuggers and the compiler's own record, which nothing needs to run."""
    with tempfile.NamedTemporaryFile(suffix=".so", dir=os.environ[_FOLDER]) as file:
        file.write(library)
        file.flush()
        subprocess.run([strip, "--strip-unneeded", file.name], check=True, capture_output=True)
        return Path(file.name).read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Inductor talks about its own internals; what matters to the user we say ourselves."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
