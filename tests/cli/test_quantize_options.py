"""`precast export --quantize …`: what is said about options that are wrong, before any work."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from precast.cli import main


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, checkpoint):
    """`run("--quantize", "int8")`: exit code, standard output, standard error of an export of a tiny Llama."""
    shutil.copytree(checkpoint("llama"), tmp_path / "llama")
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["precast", "export", "llama", "-q", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return call


NONE = "say how weights are rounded, which --quantize none does not do"
WRONG = {
    "a scheme": (("--quantize", "int3"), "--quantize int3", "the choices are: none, source, int8, int4, auto"),
    "a method": (("--quantize", "int8", "--method", "hqq"), "--method hqq", "rtn, search, gptq, awq"),
    "caches that attention cannot read": (
        ("--kv-cache", "float16"), "--kv-cache float16 is not for --backend onnx", "aoti, export", "int8 is for all",
    ),
    "text for no grid": (
        ("--backend", "export", "--kv-cache", "float16", "--calibration", "x"), "--calibration", "--kv-cache int8, too",
    ),
    "a group": (("--quantize", "int8", "--group-size", 48), "--group-size 48", "16, 32, 64, 128, 256"),
    "no number": (("--quantize", "int8", "--group-size", "x"), "'--group-size'", "'x'", "integer"),
    "caches": (("--kv-cache", "int4"), "--kv-cache int4", "the choices are: float32, float16, int8"),
    "a method for nothing": (("--method", "gptq"), "--method", NONE),
    "symmetry for nothing": (("--asymmetric",), "--symmetric/--asymmetric", NONE),
    "a method for a source": (("--quantize", "source", "--method", "gptq"), "which --quantize source does not do"),
    "a floor for nothing": (("--max-kl", 0.1), "--max-kl bound what is lost", "--atol is the bound"),
    "acceptance of nothing": (("--accept-loss",), "--accept-loss bound"),
    "a pattern for nothing": (("--skip", "lm_head"), "--skip"),
    "a negative loss": (("--quantize", "int8", "--max-kl", "-1"), "--max-kl must be above 0, not -1"),
    "no loss": (("--quantize", "int8", "--max-kl", "nan"), "--max-kl must be above 0, not nan"),
    "a share above one": (
        ("--quantize", "int8", "--min-agreement", 95), "--min-agreement must lie between 0 and 1, not 95"
    ),
    "a missing text": (
        ("--quantize", "int4", "--calibration", "missing.txt"), "--calibration: there is no file missing.txt"
    ),
    "several at once": (("--quantize", "int3", "--max-kl", 0), "--quantize int3", "--max-kl must be above 0, not 0"),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_wrong_usage(run, tmp_path, words):
    code, out, err = run("-o", "out", "--sequence-length", 16, *words[0])
    assert (code, out) == (2, ""), err
    assert err.startswith("precast: ")
    assert err.count("\n") == 1
    for part in words[1:]:
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"])
def test_a_calibration_text_that_says_nothing(run, tmp_path, content):
    """No quiet fallback to a method without calibration, and no traceback for what is no text."""
    (tmp_path / "text.txt").write_bytes(content)
    words = ("--quantize", "int4", "--method", "gptq", "--calibration", "text.txt", "--sequence-length", 16)
    code, _, err = run("-o", "out", *words)
    assert code in (1, 2)
    assert err.count("\n") == 1
    assert "text.txt" in err
    assert "Traceback" not in err


def test_a_loss_is_reported_and_can_be_accepted(run, tmp_path):
    words = ("--sequence-length", 16, "--quantize", "int4", "--max-kl", "1e-6")
    code, out, err = run("-o", "out", *words)
    assert (code, out) == (1, "")
    for part in ("KL divergence of 0.", "--max-kl allows 1e-06", "--method gptq", "--accept-loss"):
        assert part in err
    assert not (tmp_path / "out").exists()
    code, out, err = run("-o", "out", *words, "--accept-loss", "--json")
    accuracy = json.loads(out)["accuracy"]
    assert (code, accuracy["status"]) == (0, "accepted"), err
    assert accuracy["kl_divergence"] > 1e-6
