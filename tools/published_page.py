"""Makes `docs/published.md`: what becomes of checkpoints as people publish them.

    PRECAST_CORPUS=FOLDER python tools/published_page.py [--jobs 2] [NAME ...]

`FOLDER/configs` holds a folder of small files for each checkpoint: configuration, tokenizer, processor, generation
settings, no weights. Each is given random weights, by its configuration with fewer and narrower layers, and a small
vocabulary; it is exported with validation, and its tokens, texts and inputs are compared with those of transformers.
Only the folders named are tried where there are names; the page keeps the rows of all others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import with_tests  # noqa: F401
from workers import attempt_all, serve

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/published.md"
SAME, REFUSED, UNKNOWN, FAILS = "same", "refused", "unknown", "fails"
COLUMNS = ("checkpoint", "type", "task", "verdict", "why")
STAND_IN = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
"""For files without a configuration beside them."""

TEXTS = (
    "The capital of France is Paris.",
    " two  spaces, and\n\na line",
    "你好 – naïve café",
    "<s>a</s> [SEP] <|im_end|>",
    "",
)
HELLO = [{"role": "user", "content": "Hello"}]
TALKS = (
    HELLO,
    [{"role": "system", "content": "Be brief."}, *HELLO],
    [*HELLO, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}],
)


class Different(Exception):
    """An answer is not that of transformers."""


class Unknown(Exception):
    """transformers cannot do it either."""


def attempt(name: str) -> dict[str, Any]:
    """One folder: a row of the page."""
    from precast.runtime.errors import AccuracyError, ExportError, PrecastError

    row = {"checkpoint": name, "type": "", "task": "", "notes": []}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _compare(row, Path(scratch))
            verdict, why = SAME, ""
        except Unknown as error:
            verdict, why = UNKNOWN, str(error)
        except (Different, AccuracyError) as error:
            verdict, why = FAILS, f"{type(error).__name__}: {error}"
        except PrecastError as error:
            # What is known to pass is no longer refused while it is compiled.
            verdict, why = FAILS if isinstance(error, ExportError) and is_listed(row) else REFUSED, str(error)
        except Exception as error:
            verdict, why = FAILS, f"raises {type(error).__module__}.{type(error).__name__}: {error}"
        why = why.replace(scratch, "")
    return {"checkpoint": name, "type": row["type"], "task": row["task"], "verdict": verdict,
            "why": " ".join("; ".join([*([why] if why else []), *row["notes"]]).split())}  # fmt: skip


def _compare(row: dict[str, Any], scratch: Path) -> None:
    """Raise where this folder's answers are not those of transformers."""
    from precast.exporter import ExportOptions, export
    from precast.exporter.checkpoint.early import check_supported
    from precast.exporter.checkpoint.resolve import resolve
    from precast.runtime.errors import ExportError

    source = _laid_out(row, scratch / row["checkpoint"])
    raw = json.loads((source / "config.json").read_bytes())
    row["type"] = str(raw.get("model_type") or "–")
    _take_quantization(row, source, raw)
    config = _known(source)
    _fill(row, source, raw, config)
    asked = _asked_task(raw, config)
    check_supported(str(source), asked)
    checkpoint = resolve(str(source), ExportOptions(task=asked))
    task = checkpoint.task(asked)
    row["task"] = task.name
    options = ExportOptions(task=asked, **_sizes(task, checkpoint))
    try:
        artifact = export(str(source), scratch / "out", options)
    except ExportError:
        _check_computes(source, type(checkpoint.skeleton(task)))
        raise
    _compare_tokens(row, source, artifact.path)
    _compare_generated(checkpoint.load(task, "float32"), task, artifact.path)
    _compare_inputs(row, source, task, artifact.path)


def _laid_out(row: dict[str, Any], source: Path) -> Path:
    shutil.copytree(_folder() / row["checkpoint"], source)
    if not (source / "config.json").is_file():
        row["notes"].append("no config.json: a small Llama stands in")
        (source / "config.json").write_text(json.dumps({**STAND_IN, "vocab_size": _highest_id(source) + 1}))
    return source


def _highest_id(source: Path) -> int:
    """Of the tokens that the generation settings name; at least enough for the small vocabulary."""
    path = source / "generation_config.json"
    found = re.findall(rb"\b\d{3,6}\b", path.read_bytes()) if path.is_file() else []
    return max([4000, *map(int, found)])


def _take_quantization(row: dict[str, Any], source: Path, raw: dict[str, Any]) -> None:
    """Random weights are not packed: how they would be is left out."""
    if raw.pop("quantization_config", None):
        row["notes"].append("its weights as floats")
        (source / "config.json").write_text(json.dumps(raw))


def _known(source: Path) -> Any:
    """The configuration as transformers reads it. Raises Unknown where it does not, and neither does an export."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # It raises anything: KeyError, TypeError, validators' errors.
        reason = next(iter(str(error).splitlines()), "")
        _export_is_refused(source)
        code = "it brings code of its own" if "custom code" in reason else f"{type(error).__name__} {reason:.150}"
        raise Unknown(f"transformers cannot read its configuration: {code}") from error


def _export_is_refused(source: Path) -> None:
    """What transformers does not know is refused by its name. Raises what is raised otherwise."""
    from precast.exporter import ExportOptions, export
    from precast.runtime.errors import PrecastError

    try:
        export(str(source), source.parent / "refused", ExportOptions(batch_size=1, sequence_length=(16,)))
    except PrecastError:
        return
    raise Different("exported, though transformers does not know it")


def _fill(row: dict[str, Any], source: Path, raw: dict[str, Any], config: Any) -> None:
    """Weights and a vocabulary for the folder, whose configuration becomes narrow."""
    import transformers
    from zoo.published import make_model, make_tokenizer, narrow

    small = narrow(raw, config)
    (source / "config.json").write_text(json.dumps(small))
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        cls = _class(raw, config)
    except Exception as error:
        raise Unknown(f"transformers cannot read it: {type(error).__name__} {error}") from error
    if cls is None:
        _export_is_refused(source)
        raise Unknown(f"transformers has no {', '.join(raw.get('architectures') or ['architecture that it names'])}")
    if any((source / name).is_file() for name in ("tokenizer_config.json", "special_tokens_map.json")):
        make_tokenizer(source)
        _check_tokenizer(row, source)
    _write_heads(source)
    try:
        make_model(source, cls, config)
    except Exception as error:
        raise Unknown(f"transformers cannot build it: {type(error).__name__} {error}") from error


def _class(raw: dict[str, Any], config: Any) -> Any:
    import transformers

    from precast.exporter.support import infer_task
    from precast.runtime.artifact.tasks import get_task

    for name in raw.get("architectures") or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    task = infer_task(raw) or (None if raw.get("architectures") else "text-generation")
    if task is None:
        return None
    mapping = getattr(transformers, get_task(task).auto)._model_mapping
    found = mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _check_computes(source: Path, cls: Any) -> None:
    """Raise Unknown where transformers reads a configuration by which its own tensors do not fit each other."""
    import torch

    try:
        with torch.no_grad():
            cls.from_pretrained(source, dtype=torch.float32).eval()(input_ids=torch.tensor([[5, 6, 7]]))
    except (OSError, TypeError, ValueError):
        return  # It wants other files, or other inputs.
    except RuntimeError as error:
        raise Unknown(f"transformers cannot compute with it: {type(error).__name__} {error}") from error


def _check_tokenizer(row: dict[str, Any], source: Path) -> None:
    """Leave the tokenizer out where transformers cannot read these files without the vocabulary published with them."""
    from precast.exporter import ExportOptions
    from precast.exporter.checkpoint.resolve import resolve
    from precast.runtime.errors import PrecastError

    try:
        _tokenizer(source)
        return
    except Exception as error:
        row["notes"].append(f"without its tokenizer, which wants its own vocabulary or code ({type(error).__name__})")
    try:
        _ = resolve(str(source), ExportOptions()).tokenizer
    except PrecastError:
        for name in _OF_TOKENIZERS:
            (source / name).unlink(missing_ok=True)
    else:
        raise Different("a tokenizer that transformers cannot read is read")


_OF_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    # Not given, it would ask on the terminal whether to run code.
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _write_heads(source: Path) -> None:
    """Modules of sentence-transformers of the narrow width, and weights for those that have some."""
    import torch
    from safetensors.torch import save_file

    width = 64
    if (source / "modules.json").is_file():
        for module in json.loads((source / "modules.json").read_text("utf-8")):
            path = source / module["path"] / "config.json"
            if module["type"].endswith("Pooling") and not path.is_file():
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps({"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}))
    for path in sorted(source.glob("*_*/config.json")):
        held = json.loads(path.read_text("utf-8"))
        if "word_embedding_dimension" in held:
            held["word_embedding_dimension"] = width
        if "in_features" in held:
            held |= {"in_features": width, "out_features": 32}
            tensors = {"linear.weight": torch.randn(32, width) / 8, "linear.bias": torch.randn(32)}
            save_file(tensors, path.parent / "model.safetensors")
        path.write_text(json.dumps(held))


def _asked_task(raw: dict[str, Any], config: Any) -> str | None:
    """Models that read images or sounds with a language model are asked for that alone; what names no class, too."""
    import transformers

    if not raw.get("architectures"):
        return "text-generation"
    both = transformers.AutoModelForMultimodalLM._model_mapping
    has_part = config.get_text_config(decoder=True) is not config and not config.is_encoder_decoder
    speech = transformers.AutoModelForSpeechSeq2Seq._model_mapping
    return "text-generation" if has_part and type(config) in both and type(config) not in speech else None


def _sizes(task: Any, checkpoint: Any) -> dict[str, Any]:
    if task.kind == "decoder":
        return {"batch_size": _beams(checkpoint), "sequence_length": (32,), "dynamic_batch_size": True}
    if task.kind == "seq2seq":
        lengths = {"sequence_length": (24,)} if "sequence_length" in task.axes else {}
        return {
            "batch_size": _beams(checkpoint),
            "decoder_sequence_length": 24,
            "dynamic_batch_size": True,
            **lengths,
        }
    sizes: dict[str, Any] = {"batch_size": 2}
    inputs = {getattr(checkpoint.skeleton(task), "main_input_name", "")}
    if "input_ids" in inputs:
        sizes["sequence_length"] = (24,)
    if "input_values" in inputs:
        sizes["audio_sequence_length"] = (4000,)
    if "text_batch_size" in task.axes:
        sizes |= {"text_batch_size": 2, "sequence_length": (16,)}
    return sizes


def _beams(checkpoint: Any) -> int:
    """The rows that one answer takes by the published settings, at least two."""
    counts = [2]
    for name in ("config.json", "generation_config.json"):
        path = checkpoint.directory / name
        if path.is_file():
            counts += re.findall(rb'"num_beams":\s*(\d+)', path.read_bytes())
    return max(map(int, counts))


# ---------------------------------------------------------------- comparing


def _compare_tokens(row: dict[str, Any], source: Path, artifact: Path) -> None:
    from precast.runtime import Tokenizer

    if not (artifact / "tokenizer.json").is_file():
        return
    theirs, ours = _tokenizer(source), Tokenizer(artifact)
    try:
        theirs(TEXTS[0])
    except ValueError:
        row["notes"].append("its tokenizer takes words, not texts")
        return
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        _equal(f"the tokens of {text!r}", ours.encode(text), expected)
        for skip in (True, False):
            _equal(f"the text of {text!r}'s tokens", ours.decode(expected, skip_special_tokens=skip),
                   theirs.decode(expected, skip_special_tokens=skip))  # fmt: skip
    if theirs.chat_template:
        for talk in TALKS:
            _equal("a chat's text", _chat(ours, talk), _chat(theirs, talk))


def _chat(tokenizer: Any, talk: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    except Exception:  # A template raises whatever Python does.
        return "refused"


def _compare_generated(model: Any, task: Any, artifact: Path) -> None:
    """Six tokens by the published settings, but greedily: random choices are each library's own."""
    import torch

    from precast.runtime import CompiledModel

    if task.kind == "encoder":
        return
    ours = CompiledModel.from_pretrained(artifact)
    generator = np.random.default_rng(0)
    if task.name == "automatic-speech-recognition":
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        given = {"input_features": generator.normal(size=shape).astype(np.float32)}
    else:
        given = {"input_ids": generator.integers(5, 250, (2, 7)), "attention_mask": np.ones((2, 7), np.int64)}
    options = {"max_new_tokens": 6, "do_sample": False}
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    try:
        expected = model.generate(**tensors, **options).numpy()
    except Exception as error:
        raise Unknown(f"transformers cannot generate with it: {type(error).__name__} {error}") from error
    _equal("generated tokens", ours.generate(**given, **options).tolist(), expected.tolist())


def _compare_inputs(row: dict[str, Any], source: Path, task: Any, artifact: Path) -> None:
    """Images and sounds as the model is given them."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    from precast.runtime.pipelines.processors import ImageProcessor, SoundProcessor

    if not (source / "preprocessor_config.json").is_file() or task.name == "text-generation":
        return
    generator = np.random.default_rng(0)
    if "image" in task.name or task.name in ("object-detection", "semantic-segmentation"):
        image = _image(generator)
        expected = _theirs(AutoImageProcessor, source)(images=[image], return_tensors="np")["pixel_values"]
        _close("pixel values", ImageProcessor(artifact)([image])["pixel_values"], expected)
    elif "audio" in task.name or "speech" in task.name:
        wave = generator.normal(size=4000).astype(np.float32)
        theirs = _theirs(AutoFeatureExtractor, source)
        expected = theirs([wave], sampling_rate=theirs.sampling_rate, return_tensors="np")
        found = SoundProcessor(artifact)([wave])
        for name in ("input_values", "input_features"):
            if name in expected:
                _close(name, found[name], expected[name])


def _image(generator: np.random.Generator) -> Any:
    from PIL import Image

    return Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def _theirs(auto: Any, source: Path) -> Any:
    try:
        return auto.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise Unknown(f"transformers cannot read its processor: {type(error).__name__} {error}") from error


def _equal(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Different(f"{what}: {found!r:.200} instead of {expected!r:.200}")


def _close(what: str, found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise Different(f"{what} of the shape {list(found.shape)} instead of {list(expected.shape)}")
    if (difference := float(np.abs(found - expected).max())) > 1e-4 * max(1.0, float(np.abs(expected).max())):
        raise Different(f"{what} differ by {difference:.2g}")


# ---------------------------------------------------------------- the page


def is_listed(row: dict[str, str]) -> bool:
    """Whether the support table says that this type and task pass."""
    from precast.exporter.support import supported_tasks

    found = supported_tasks(row["type"]).get(row["task"])
    return found is not None and found.passes


def kept_rows(text: str) -> dict[str, dict[str, str]]:
    """The rows of a page by their checkpoints."""
    cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count(" | ") >= 4]
    rows = [dict(zip(COLUMNS, [cell.strip() for cell in each], strict=False)) for each in cells]
    return {row["checkpoint"]: row for row in rows if row["verdict"] in (SAME, REFUSED, UNKNOWN, FAILS)}


def page(rows: Iterable[dict[str, str]]) -> str:
    """`docs/published.md`."""
    ordered = sorted(rows, key=lambda row: row["checkpoint"])
    count = Counter(row["verdict"] for row in ordered)
    listed = [row for row in ordered if is_listed(row)]
    same = sum(row["verdict"] == SAME for row in listed)
    parts = [
        "# Checkpoints as they are published",
        "",
        f"Made by `python tools/published_page.py` of the small files of {len(ordered)} checkpoints: configuration, "
        "tokenizer, processor, generation settings. Each was given random weights by its own configuration, with fewer "
        "and narrower layers and all else as published, and a small vocabulary; it was exported to `onnx` and compared "
        "with transformers: logits or states, greedy tokens by its generation settings, token ids, texts of chats, "
        "pixels and features.",
        "",
        f"- {count[SAME]} **same** as transformers",
        f"- {count[REFUSED]} **refused**, by name and with the reason",
        f"- {count[UNKNOWN]} **unknown** to transformers without code or weights of their own",
        f"- {count[FAILS]} **fails**",
        "",
        f"Of the {len(listed)} whose type and task [support.md](support.md) lists, {same} are the same"
        f"{f' ({same / len(listed):.1%})' if listed else ''}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row[name].replace('|', '/') for name in COLUMNS)} |" for row in ordered),
    ]
    return "\n".join(parts) + "\n"


def _folder() -> Path:
    return Path(os.environ["PRECAST_CORPUS"]) / "configs"


def names() -> list[str]:
    """All folders of the corpus."""
    return sorted(path.name for path in _folder().iterdir() if path.is_dir())


def main() -> int:
    """Try what was asked for, say how it goes, write the page; 1 where something fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these folders")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        serve(attempt)
        return 0
    if "PRECAST_CORPUS" not in os.environ:
        parser.error("PRECAST_CORPUS must name the folder with the published files")
    todo = [name for name in names() if not asked.names or name in asked.names]
    made = {}
    for name, answer in zip(todo, attempt_all(__file__, todo, asked.jobs), strict=True):
        row = {"checkpoint": name, "type": "", "task": "", "verdict": FAILS, "why": answer.get("error", ""), **answer}
        made[name] = {column: row[column] for column in COLUMNS}
        print(f"{name:<36}{row['verdict']:<10}{row['why']}", flush=True)
        # Written each time, and read anew: others may have been made meanwhile.
        kept = kept_rows(PAGE.read_text("utf-8")) if PAGE.is_file() else {}
        PAGE.write_text(
            page({name: row for name, row in {**kept, **made}.items() if name in names()}.values()), "utf-8"
        )
    print(
        "\n"
        + ", ".join(
            f"{number} {verdict}" for verdict, number in Counter(row["verdict"] for row in made.values()).items()
        )
    )
    return 1 if any(row["verdict"] == FAILS for row in made.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
