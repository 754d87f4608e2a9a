"""Link libraries so that they stand alone, with pieces of our own in the place of PyTorch and of OpenMP.

AOTInductor's code calls PyTorch through a C ABI of some forty functions (torch/csrc/inductor/aoti_torch/c/shim.h) and
Sleef's vector functions; GCC's OpenMP code calls libgomp. The pieces (cpp/) have those that lowered decoders call. What
calls more needs PyTorch where it runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor import cpp_builder

from precast.runtime.errors import ExportError

from ..isa import cpu_flags_needed, march
from ..workspace import FOLDER

__all__ = ["Linker"]

_SOURCES = Path(__file__).parent / "cpp"
_SHARED_HEADER = _SOURCES.parent.parent / "cpp" / "array.h"
_PIECES = ("tensors", "threads", "math", "topk", "ranks", "run")
_MATMUL_PIECES = ("gemm", "convolution")
_WITHOUT_GROUPS = "--force-group-allocation"
_LAYER_PIECE, _LAYER_SYMBOL = "layer", "precast_layer"
_FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-ffunction-sections")
# Nothing may stay open that no library answers; nothing is seen from outside but what the runtime calls.
_LINK_FLAGS = (
    "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,--as-needed",
    "-Wl,--gc-sections", "-Wl,--no-demangle", f"-Wl,--version-script={_SOURCES / 'exported.map'}",
)  # fmt: skip
_REPLACED = re.compile(r"-l(torch|torch_cpu|c10|gomp|omp)|-L.*/torch/lib|-fopenmp")


class Linker:
    """Links the libraries of a variant: all so that they stand alone, or all with PyTorch. Used as a context, within
    the compiler's workspace.

    Compiled pieces stay in the folder `kept`. With `has_products` our own products of matrices are among them; their
    sums are float32, and PyTorch is faster in dtypes that the CPU has instructions for.

    Attributes:
        missing: why they do not stand alone: the calls that only PyTorch answers, so far, or what the tools refuse.
    """

    def __init__(self, isa: str, kept: Path, *, has_products: bool) -> None:
        self.missing: set[str] = set()
        self._isa, self._kept = isa, kept
        self._pieces = (*_PIECES, *(_MATMUL_PIECES if has_products else ()))
        # Inductor makes it when it first writes there.
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(dir=folder)
        self._alone: list[tuple[list[str], Path]] = []
        """Commands that would link with PyTorch what is linked otherwise so far."""
        self._layers: list[Path] = []
        """Objects of layers that the next library calls."""
        if not sys.platform.startswith("linux") or not cpp_builder.is_gcc():
            self.missing.add("OpenMP of another compiler than GCC")

    def __enter__(self) -> Linker:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @contextmanager
    def linking(self, layer: str = "") -> Iterator[None]:
        """Within this block Inductor's libraries are linked alone, unless something is missing already. What it would
        link for a `layer` is kept for the next library, as a function of that name."""
        build: Any = cpp_builder.CppBuilder.build
        linker = self

        def build_alone(self: cpp_builder.CppBuilder) -> None:
            command = shlex.split(self.get_command_line())
            if not _is_link(command):
                build(self)
            elif layer:
                linker._layers.append(linker._combine(command, layer))
            else:
                linker._link(command)

        cpp_builder.CppBuilder.build = build_alone  # type: ignore[method-assign]
        try:
            yield
        finally:
            cpp_builder.CppBuilder.build = build  # type: ignore[method-assign]

    def link_with_torch(self) -> Iterator[Path]:
        """Link with PyTorch what was linked alone: the libraries, in their order. Raises ExportError."""
        for command, library in self._alone:
            _check(_run(command))
            yield library

    @property
    def can_call_layers(self) -> bool:
        """Whether layers can be compiled by themselves: by GNU's linker, as others lack what that takes."""
        return not self.missing and all(map(shutil.which, ("objcopy", "nm"))) and _WITHOUT_GROUPS in _linker_help()

    def _combine(self, command: Sequence[str], layer: str) -> Path:
        """One object of a layer's objects, in which only the function `layer` can be seen: everything else is there
        for each layer."""
        (piece,) = self._compile_pieces([_LAYER_PIECE])
        objects = [*(word for word in command if word.endswith(".o")), str(piece)]
        target = Path(self._folder.name) / f"{layer}.o"
        # Without groups: the linker would keep one of those that all layers have, which then nobody else can see.
        compiler = cpp_builder.get_cpp_compiler()
        _check(_run([compiler, "-r", "-nostdlib", f"-Wl,{_WITHOUT_GROUPS}", *objects, "-o", str(target)]))
        _check(_run(["objcopy", f"--keep-global-symbol={_LAYER_SYMBOL}", str(target)]))
        renamed = {_LAYER_SYMBOL: layer, **{name: f"{layer}_{name}" for name in _unique_symbols(target)}}
        _check(_run(["objcopy", *(f"--redefine-sym={old}={new}" for old, new in renamed.items()), str(target)]))
        return target

    def _link(self, command: Sequence[str]) -> None:
        layers, self._layers = [str(layer) for layer in self._layers], []
        if self.missing or not self._link_alone([*command, *layers]):
            _check(_run([*command, *layers]))

    def _link_alone(self, command: list[str]) -> bool:
        """Whether that succeeded; if not, `missing` says why."""
        pieces = self._compile_pieces(self._pieces)
        if self.missing:
            return False
        done = _run([*(word for word in command if not _REPLACED.fullmatch(word)), *map(str, pieces), *_LINK_FLAGS])
        if done.returncode:
            undefined = re.findall(r"undefined reference to `([^']+)'", done.stderr)
            self.missing.update(name[:256] for name in undefined or [_first_error(done.stderr)])
            return False
        self._alone.append((self._keep_objects(command), Path(command[command.index("-o") + 1])))
        return True

    def _keep_objects(self, command: Sequence[str]) -> list[str]:
        """The command with copies of its objects, which Inductor deletes."""
        folder = tempfile.mkdtemp(dir=self._folder.name)
        return [str(shutil.copy(word, folder)) if word.endswith(".o") else word for word in command]

    def _compile_pieces(self, names: Sequence[str]) -> list[Path]:
        """Pieces' object files for this level of instructions."""
        flags = [*_FLAGS, f"-march={march(self._isa)}", "-isystem", str(Path(torch.__file__).parent / "include")]
        texts = b"".join(file.read_bytes() for file in [*sorted(_SOURCES.iterdir()), _SHARED_HEADER])
        compiler = _run([cpp_builder.get_cpp_compiler(), "--version"]).stdout
        key = repr((texts, flags, torch.__version__, compiler, cpu_flags_needed(self._isa)))
        folder = self._kept / f"pieces-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return [self._compile_piece(_SOURCES / f"{name}.cpp", folder, flags) for name in names]

    def _compile_piece(self, source: Path, folder: Path, flags: Sequence[str]) -> Path:
        target = folder / f"{source.stem}.o"
        if target.exists():
            return target
        # Others may be at it, too: each writes a file of its own, and the last to be done counts.
        staged = folder / f"{source.stem}-{os.getpid()}.o"
        done = _run([cpp_builder.get_cpp_compiler(), *flags, "-c", str(source), "-o", str(staged)])
        if done.returncode:
            self.missing.add(f"{source.name}: {_first_error(done.stderr)}"[:256])
            return target
        return staged.replace(target)


def _is_link(command: Sequence[str]) -> bool:
    """Whether a library is made of what is compiled already: Inductor's trials of the compiler start from sources."""
    return "-shared" in command and not any(word.endswith((".cpp", ".cc")) for word in command)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # Messages are read, and the compiler translates them otherwise.
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)


@cache
def _linker_help() -> str:
    return _run([cpp_builder.get_cpp_compiler(), "-Wl,--help"]).stdout


def _unique_symbols(file: Path) -> list[str]:
    """Variables of inline definitions, which GCC gives a kind of symbol that objcopy does not hide."""
    listed = _run(["nm", "--format=posix", "--defined-only", str(file)])
    _check(listed)
    return [words[0] for words in map(str.split, listed.stdout.splitlines()) if words[1] == "u"]


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise ExportError(f"The library cannot be linked: {_first_error(done.stderr)}")


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason given"]
    return next((line for line in lines if "error" in line), lines[-1])
