"""Tiny random checkpoints of published configuration files: fewer layers and narrower ones, all else as it is."""

from __future__ import annotations

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from zoo.encoders import fill, settle
from zoo.shrink import SIZES, changes_to

__all__ = ["make_model", "make_tokenizer", "narrow"]

_NO_WIDTH = ("vocab", "position", "window", "chunk", "attention_local", "floor_scale", "block_size", "image_size",
             "crop_size", "n_ctx", "max_seq_len", "context_length", "max_source", "max_target", "index_")  # fmt: skip
KEPT = {name for name in SIZES if any(part in name for part in _NO_WIDTH) and name != "max_window_layers"}
KEPT |= {"pad_token_id", "bos_token_id", "eos_token_id", "input_size", "query_pre_attn_scalar"}
"""Sizes that are neither width nor depth: vocabularies and their special tokens, positions, windows, images."""

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_MORE = {
    "pooler_hidden_size": 64, "dim": 64, "hidden_dim": 96, "word_embed_proj_dim": 64, "n_head_kv": 2,
    "conv_dim": [32] * 7, "tdnn_dim": [32] * 5, "classifier_proj_size": 32, "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "output_hidden_size": 64, "attention_dim": 64, "cross_attention_hidden_size": 64, "adapter_hidden_dim": 64,
    "d_model": 64, "vision_hidden_size": 64, "text_hidden_size": 64,
}  # fmt: skip
"""Widths that default configurations do not need."""
_OF_TYPES: dict[str, dict[str, Any]] = {
    # One of the kinds of layers in eight has attention.
    "jamba": {"num_hidden_layers": 8},
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    # Four coordinates and two sizes of a box make a position as wide as the states.
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
}

_OF_DEPTH = ("out_features", "out_indices", "stage_names")
"""Names and numbers of layers that are left out."""


def narrow(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    """The configuration file `raw`, which transformers read as `config`, with fewer and narrower layers."""
    small = json.loads(json.dumps(raw))
    _put(small, config, _changes(config, raw))
    small.update(_OF_TYPES.get(raw.get("model_type", ""), {}))
    for name in _OF_DEPTH:
        small.pop(name, None)
    return small


def _changes(config: Any, raw: dict[str, Any]) -> dict[str, Any]:
    changes = {name: value for name, value in changes_to(config, KEPT).items() if not name.startswith("rope")}
    values = config.to_dict()
    changes |= {name: value for name, value in _MORE.items() if values.get(name) and _is_like(values[name], value)}
    heads = next((name for name in _HEADS if name in changes), None)
    for name in _KEYS:
        if values.get(name) is None:
            changes.pop(name, None)
        elif heads and values[name] == values[heads]:
            changes[name] = changes[heads]
    if values.get("cross_attention_layers"):
        changes["cross_attention_layers"] = [1]
    if values.get("num_kv_shared_layers"):
        kinds = list(changes.get("layer_types") or values["layer_types"][:2])
        changes |= {"num_hidden_layers": 2 * len(kinds), "num_kv_shared_layers": len(kinds), "layer_types": kinds * 2}
    if values.get("head_dim") is None or (values.get("head_dim") and "head_dim" not in raw):
        changes.pop("head_dim", None)
    return changes


def _is_like(held: Any, small: Any) -> bool:
    return isinstance(held, list | tuple) is isinstance(small, list)


def _put(raw: dict[str, Any], config: Any, changes: dict[str, Any]) -> None:
    """Write changes under the names that the file has for them; parts that it has no object for stand in it flat."""
    for name, value in changes.items():
        if name in config.sub_configs:
            _put_part(raw, config, name)
            continue
        raw[name] = value
        for alias, actual in config.attribute_map.items():
            if actual == name and alias in raw:
                raw[alias] = value
    _cut_rope(raw, config)


def _put_part(raw: dict[str, Any], config: Any, name: str) -> None:
    part = getattr(config, name, None)
    if part is None:
        return
    inner = _changes(part, raw.get(name) or raw)
    if isinstance(raw.get(name), dict):
        _put(raw[name], part, inner)
        return
    _put_flat(raw, inner)
    if not _is_read(raw, config, name, inner):
        # transformers does not read it from there either: all of the part is as by default.
        raw[name] = {"rope_parameters": getattr(part, "rope_parameters", None), **inner}
        _cut_rope(raw[name], part)


def _is_read(raw: dict[str, Any], config: Any, name: str, changes: dict[str, Any]) -> bool:
    part = getattr(type(config).from_dict(json.loads(json.dumps(raw))), name)
    flat = {each: value for each, value in changes.items() if each in raw}
    return bool(flat) and all(getattr(part, each, value) == value for each, value in flat.items())


def _put_flat(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    raw.update({name: value for name, value in changes.items() if name in raw})


def _cut_rope(raw: dict[str, Any], config: Any) -> None:
    """Factors for each pair of a head's dimensions, for heads that have fewer."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    width = raw.get("head_dim") or raw.get("hidden_size", 64) // raw.get("num_attention_heads", 4)
    pairs = int(width * raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][:pairs]
    if isinstance(section := rope.get("mrope_section"), list):
        rest = [size * pairs // sum(section) for size in section[1:]]
        rope["mrope_section"] = [pairs - sum(rest), *rest]


def make_model(path: Path, cls: Any, config: Any) -> Any:
    """Random weights for the configuration that lies at `path`, saved there; config.json stays as it is."""
    torch.manual_seed(0)
    config.dtype = torch.float32
    model = cls(config).eval()
    fill(model)
    side = getattr(config, "image_size", None)
    settle(model, side if isinstance(side, int) else 224)
    written = {name: (path / name).read_bytes() for name in _WRITTEN if (path / name).is_file()}
    model.save_pretrained(path)
    for name in _WRITTEN:
        (path / name).unlink(missing_ok=True)
    for name, data in written.items():
        (path / name).write_bytes(data)
    return model


_WRITTEN = ("config.json", "generation_config.json")

# ---------------------------------------------------------------- vocabularies, which are not published with the rest


def make_tokenizer(path: Path) -> None:
    """A vocabulary of the kind that the folder's tokenizer wants, trained on a few lines."""
    name = _class_of(path)
    if name in _PIECES:
        _write_pieces(path, *_PIECES[name])
    elif not (path / "vocab.json").is_file():
        # One of letters, published whole.
        made = json.loads(_vocabulary(_kind_of(name), tuple(_special_tokens(path))).to_str())
        as_published = {
            each["content"]: each for each in _read(path / "tokenizer_config.json").get(_ADDED, {}).values()
        }
        made["added_tokens"] = [each | as_published.get(each["content"], {}) for each in made["added_tokens"]]
        (path / "tokenizer.json").write_text(json.dumps(made), "utf-8")


_ADDED = "added_tokens_decoder"
_PIECES = {
    "MarianTokenizer": ("source.spm", "target.spm"),
    "M2M100Tokenizer": ("sentencepiece.bpe.model",),
    "Speech2TextTokenizer": ("sentencepiece.bpe.model",),
}
"""Tokenizers in Python, and what their models of SentencePiece are called; vocab.json numbers the pieces."""


def _write_pieces(path: Path, *names: str) -> None:
    model = _pieces()
    for name in names:
        (path / name).write_bytes(model)
    processor = SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    tokens = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *_special_tokens(path), *pieces])
    (path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))


@cache
def _pieces() -> bytes:
    made = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXTS), model_writer=made, vocab_size=200, hard_vocab_limit=False, minloglevel=2
    )
    return made.getvalue()


def _class_of(path: Path) -> str:
    """The tokenizer that the files name, or else that of their type of model."""
    named, config = _read(path / "tokenizer_config.json").get("tokenizer_class"), _read(path / "config.json")
    return named or TOKENIZER_MAPPING_NAMES.get(config.get("model_type")) or ""


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _special_tokens(path: Path) -> list[str]:
    """Those that the files name."""
    named = _read(path / "special_tokens_map.json") | _read(path / "tokenizer_config.json")
    texts = [token.get("content") if isinstance(token, dict) else token for name, token in named.items()
             if name.endswith("_token")]  # fmt: skip
    return [text for text in texts if isinstance(text, str)]


def _kind_of(name: str) -> str:
    found = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Fast"), None)
    kind = getattr(getattr(found, "model", None), "__name__", "")
    return kind if kind in ("WordPiece", "Unigram") else "BPE"


_SPECIAL = {
    "WordPiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "Unigram": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "BPE": ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<bos>", "<eos>"],
}


@cache
def _vocabulary(kind: str, special: tuple[str, ...]) -> Tokenizer:
    tokens = list(dict.fromkeys([*_SPECIAL[kind], *special]))
    settings: dict[str, Any] = {"vocab_size": 290 + len(tokens), "special_tokens": tokens, "show_progress": False}
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(**settings)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **settings)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    made.train_from_iterator(tiny.TEXTS, trainer)
    return made
