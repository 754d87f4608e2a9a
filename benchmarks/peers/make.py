"""`make peers`: every peer in an environment of its own, and SmolLM2-135M as each of them wants it.

They live in build/peers, apart from ours: a peer must not decide which versions our environment has. What cannot be
made is left out, and the reason is kept, so that results can name it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from catalog import CHECKPOINT, COMPLETE, CTRANSLATE2, GENAI, LLAMA, OPENVINO, PEERS, problem_file

# torch is for the peers' converters; other versions of it would bring CUDA.
TORCH = "torch==2.13.0"
REQUIREMENTS = {
    # The same ONNX Runtime as ours, so that loops are compared and not kernels.
    GENAI: ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", TORCH, "transformers==5.23.0", "onnx", "onnx-ir",
            "safetensors", "tqdm", "requests"),
    OPENVINO: ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "transformers==5.5.4", TORCH),
    LLAMA: ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),
    CTRANSLATE2: ("ctranslate2==4.8.5", "transformers==5.23.0", TORCH, "safetensors"),
}  # fmt: skip
# optimum-intel asks for it, and the one that comes needs CUDA's torch; text models do without.
UNWANTED = {OPENVINO: "torchvision"}
# Compiled for this very CPU, as llama.cpp is meant to be used; more jobs than two need much memory.
COMPILER = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}


def main(model: str, *pip_options: str) -> None:
    """Make what is missing, each part complete or not at all."""
    PEERS.mkdir(parents=True, exist_ok=True)
    environments = {name: partial(_make_environment, name, pip_options) for name in REQUIREMENTS}
    failed = [name for name, make in environments.items() if not _made(PEERS / name, make, COMPLETE)]
    if not CHECKPOINT.exists():
        _write_checkpoint(Path(model))
    failed += [name for name, command in _conversions() if not _made(PEERS / name, partial(_convert, command))]
    if failed:
        sys.exit(f"Not made: {', '.join(failed)}. The reasons are in {PEERS}/*.problem; benchmarks go on without.")


def _made(target: Path, make: Callable[[Path], None], mark: str = "") -> bool:
    """Make `target` unless it is there; where that fails, keep the reason."""
    notice = problem_file(target.name)
    notice.unlink(missing_ok=True)
    if (target / mark).exists():
        return True
    print(f"Making {target.name} …", flush=True)
    try:
        make(target)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines() or [str(error)]
        notice.write_text(f"could not be made: {lines[-1].strip()}\n", "utf-8")
        return False
    return True


def _make_environment(library: str, pip_options: Sequence[str], path: Path) -> None:
    _run([sys.executable, "-I", "-m", "venv", str(path)])
    pip = [str(path / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check", "-q"]
    _run([*pip, "install", *pip_options, *REQUIREMENTS[library]], COMPILER)
    if unwanted := UNWANTED.get(library):
        _run([*pip, "uninstall", "-y", unwanted])
    (path / COMPLETE).touch()


def _conversions() -> list[tuple[str, list[str]]]:
    """The directory of each converted model, and the command that takes the checkpoint to the directory named last.

    Settings are the libraries' defaults; where they have none, what their documentation shows.
    """
    source = str(CHECKPOINT)
    builder = _tool(GENAI, "python", "-I", "-m", "onnxruntime_genai.models.builder", "-m", source, "-e", "cpu")
    blocks = ("--extra_options", "block_size=32", "accuracy_level=4", "-o")
    optimum = _tool(OPENVINO, "optimum-cli", "export", "openvino", "-m", source, "--task", "text-generation-with-past")
    groups = ("--group-size", "64", "--ratio", "1.0")
    ct2 = _tool(CTRANSLATE2, "ct2-transformers-converter", "--model", source)
    return [
        ("smollm2-genai-fp32", [*builder, "-p", "fp32", "-o"]),
        ("smollm2-genai-int8", [*builder, "-p", "int8", *blocks]),
        ("smollm2-genai-int4", [*builder, "-p", "int4", *blocks]),
        ("smollm2-openvino-fp32", [*optimum, "--weight-format", "fp32"]),
        ("smollm2-openvino-int8", [*optimum, "--weight-format", "int8"]),
        ("smollm2-openvino-int4", [*optimum, "--weight-format", "int4", *groups]),
        ("smollm2-ctranslate2-fp32", [*ct2, "--quantization", "float32", "--output_dir"]),
        ("smollm2-ctranslate2-int8", [*ct2, "--quantization", "int8", "--output_dir"]),
    ]


def _tool(library: str, program: str, *arguments: str) -> list[str]:
    return [str(PEERS / library / "bin" / program), *arguments]


def _convert(command: Sequence[str], target: Path) -> None:
    stage = target.with_name(f"{target.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    _run([*command, str(stage)])
    stage.rename(target)


def _run(command: Sequence[str], changes: Mapping[str, str] | None = None) -> None:
    """Raises CalledProcessError with what the command said, also where there is no such command."""
    try:
        subprocess.run(command, env=os.environ | (changes or {}), check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise subprocess.CalledProcessError(127, command, stderr=str(error)) from None


def _write_checkpoint(source: Path) -> None:
    """The GGUF file as a Hugging Face checkpoint in fp32, which is what the peers' converters read.

    By hand, since `save_pretrained` refuses models that come from GGUF.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = CHECKPOINT.with_name(f"{CHECKPOINT.name}.part")
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    target.mkdir(parents=True, exist_ok=True)
    save_file(_untied(model), target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=2))
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    target.rename(CHECKPOINT)


def _untied(model: Any) -> dict[str, Any]:
    """The weights, each once: a safetensors file refuses two names for the same memory."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


if __name__ == "__main__":
    main(*sys.argv[1:])
