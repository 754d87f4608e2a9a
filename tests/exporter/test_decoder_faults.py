"""Faults of what is used below, and models that would mislead: each was seen once in an export of the model named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zoo import decoders

from precast.exporter import ExportOptions, architectures, export
from precast.runtime.errors import ExportError


def exported(tmp_path: Path, model_type: str, **options: Any) -> str:
    """The verdict of the export's own comparison with the eager model."""
    source = decoders.make(tmp_path / model_type, model_type)
    shapes = {"batch_size": 2, "sequence_length": (32,)}
    artifact = export(str(source), tmp_path / "out", ExportOptions(task="text-generation", **shapes, **options))
    return artifact.contract.variants[0].accuracy.status


def test_heads_rotated_in_part_in_graphs_of_static_lengths(tmp_path: Path) -> None:
    assert exported(tmp_path, "phi", prefill_lengths=(8,)) == "passed"


def test_positions_reach_a_text_model_within_that_the_model_only_hands_them_to(tmp_path: Path) -> None:
    assert exported(tmp_path, "moss_transcribe_diarize") == "passed"


def test_constants_that_folding_loses_are_restored(tmp_path: Path) -> None:
    assert exported(tmp_path, "laguna") == "passed"


def test_what_has_no_onnx_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(architectures.TRACEABLE, "deepseek_v2")
    with pytest.raises(ExportError, match=r"cannot be converted to ONNX.*complex") as caught:
        exported(tmp_path, "deepseek_v2")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
