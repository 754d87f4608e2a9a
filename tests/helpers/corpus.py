"""Files that people published, for tests where PRECAST_CORPUS names a folder of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CORPUS = Path(os.environ.get("PRECAST_CORPUS") or "nowhere")
PUBLISHED = CORPUS / "configs"
_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")

needs_corpus = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="PRECAST_CORPUS names no folder of published files")
each_processor = pytest.mark.parametrize(
    "folder", sorted({file.parent for file in PUBLISHED.glob("*/*processor_config.json")}), ids=lambda path: path.name
)


def copy_processor(folder: Path, target: Path) -> None:
    """Copy what says how a checkpoint's images or sounds are prepared."""
    for name in _FILES:
        if (folder / name).exists():
            shutil.copy(folder / name, target)
