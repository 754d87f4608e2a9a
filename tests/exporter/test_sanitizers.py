"""The kernels and the pieces of libraries that stand alone, under GCC's sanitizers: their tests are run again with code
that checks every access to memory, and all that C++ leaves undefined."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor import cpp_builder

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
# Warnings may differ with them; none of the findings is forgiven.
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-error -g1"
WRONG = """
#include <climits>
extern "C" int read(const int* x) { return x[4]; }
extern "C" int add(const int* x) { return x[0] + INT_MAX; }
"""
CALL = """
import ctypes, sys
import numpy as np
getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(np.ones(4, np.int32).ctypes.data_as(ctypes.c_void_p))
"""


@pytest.fixture
def sanitized(tmp_path):
    """The environment of a process whose C++ compiler adds the sanitizers, with their libraries loaded first."""
    real = cpp_builder.get_cpp_compiler()
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nexec {shlex.quote(real)} "$@" {FLAGS}\n')
    compiler.chmod(0o755)
    libraries = [
        subprocess.run([real, f"-print-file-name={name}.so"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("GCC's sanitizers are not installed")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "CXX": str(compiler), "LD_PRELOAD": " ".join(libraries), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        # Python itself keeps much until it ends.
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("function", "finding"), [("read", "heap-buffer-overflow"), ("add", "signed integer overflow")]
)
def test_they_find_what_is_wrong(sanitized, tmp_path, function, finding):
    (tmp_path / "wrong.cpp").write_text(WRONG)
    made = tmp_path / "wrong.so"
    subprocess.run([sanitized["CXX"], "-shared", "-fPIC", tmp_path / "wrong.cpp", "-o", made], check=True)
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(made), function], check=False, env=sanitized, capture_output=True, text=True
    )
    assert done.returncode
    assert finding in done.stderr


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_own_kernels.py", "products_are or many_rows or no_number or attention_by_the_kernel"),
        (
            "test_standalone.py",
            "functions or iteration or threads or regions or callers or view or copies or products or convolutions or "
            "windows or largest",
        ),
        ("test_fuse_attention.py", "kernel_computes or hidden or no_number"),
    ],
)
def test_they_find_nothing(sanitized, file, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:xdist", str(HERE / file), "-k", chosen]
    done = subprocess.run(command, check=False, env=sanitized, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
