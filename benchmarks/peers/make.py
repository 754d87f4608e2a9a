"""`make peers`: an environment with onnxruntime-genai, and SmolLM2-135M built for it in fp32.

It lives in build/peers, apart from ours: a peer must not decide which versions our environment has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parents[2] / "build" / "peers"
# The same ONNX Runtime as ours, so that loops are compared and not kernels. torch is for its model builder; other
# versions of it would bring CUDA.
REQUIREMENTS = ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "torch==2.13.0", "transformers==5.23.0", "onnx",
                "onnx-ir", "safetensors", "tqdm", "requests")  # fmt: skip


def main(model: str, *pip_options: str) -> None:
    """Make what is missing, each part complete or not at all."""
    environment, checkpoint = PEERS / "onnxruntime-genai", PEERS / "smollm2-hf"
    target = PEERS / "smollm2-genai-fp32"
    if not (environment / "complete").exists():
        _make_environment(environment, pip_options)
    if not target.exists():
        _write_checkpoint(Path(model), checkpoint)
        _build(environment / "bin" / "python", checkpoint, target)
        shutil.rmtree(checkpoint)


def _make_environment(path: Path, pip_options: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    pip = [str(path / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *pip_options]
    subprocess.run([*pip, *REQUIREMENTS], check=True)
    (path / "complete").touch()


def _write_checkpoint(source: Path, target: Path) -> None:
    """The GGUF file as a Hugging Face checkpoint in fp32, which is what the peer's builder reads.

    By hand, since `save_pretrained` refuses models that come from GGUF.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    target.mkdir(parents=True, exist_ok=True)
    save_file(_untied(model), target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=2))
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _untied(model: Any) -> dict[str, Any]:
    """The weights, each once: a safetensors file refuses two names for the same memory."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def _build(python: Path, checkpoint: Path, target: Path) -> None:
    stage = target.with_name(f"{target.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    builder = [str(python), "-m", "onnxruntime_genai.models.builder"]
    done = subprocess.run(
        [*builder, "-m", str(checkpoint), "-o", str(stage), "-p", "fp32", "-e", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"The peer's model builder failed:\n{done.stderr[-2000:]}")
    stage.rename(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
