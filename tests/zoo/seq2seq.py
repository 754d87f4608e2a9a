"""Encoder-decoders: every model type that is tried, its task, and its tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import transformers

TEXT, SPEECH = "text2text-generation", "automatic-speech-recognition"

_BART = {
    "vocab_size": tiny.VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": tiny.VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    # Few and near, so that short rows reach all of them.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_GEMMA = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WHISPER = {
    **_BART,
    "num_mel_bins": 16,
    "max_source_positions": 60,
    "max_target_positions": 32,
    "decoder_start_token_id": 3,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7, 2],
}

CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "m2m_100",
            "marian",
            "mbart",
            "pegasus",
            "plbart",
        ],
        _BART,
    ),
    **dict.fromkeys(["longt5", "mt5", "t5", "umt5"], _T5),
    # The decoder caps no scores of attention to the encoder, as no released checkpoint does.
    "t5gemma": {
        "encoder": _GEMMA,
        "decoder": {**_GEMMA, "attn_logit_softcapping": None, "cross_attention_hidden_size": 64},
        "vocab_size": tiny.VOCABULARY,
    },
    "whisper": _WHISPER,
}

_OWN = "its attention does not go through transformers' AttentionInterface"
REFUSED: dict[str, str] = {
    "encoder-decoder": "it is a pair of any two models, which no configuration of its own describes",
    "fsmt": _OWN,
    "led": f"{_OWN}, and its encoder looks at values to decide what to compute",
    "mvp": _OWN,
    "nllb-moe": "its mixtures of experts look at values to decide what to compute",
    "pegasus_x": "its decoder has one position for all rows, where rows have lengths of their own",
    "prophetnet": _OWN,
    "switch_transformers": "its mixtures of experts look at values to decide what to compute",
}
"""Model types that cannot be exported, each with the reason in one line for users."""

OPTIONS: dict[str, dict[str, Any]] = {
    TEXT: {"batch_size": 3, "sequence_length": (8, 24), "decoder_sequence_length": 24, "dynamic_batch_size": True},
    SPEECH: {"batch_size": 3, "dynamic_batch_size": True},
}

# As in Whisper's own generation_config.json.
_SPEAKS = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 300, "<|fr|>": 301, "<|zh|>": 302},
    "task_to_id": {"transcribe": 310, "translate": 311},
    "no_timestamps_token_id": 319,
    "prev_sot_token_id": 315,
    "return_timestamps": False,
    "suppress_tokens": [5, 6, *range(300, 320)],
    "max_length": 32,
}


def pairs() -> list[tuple[str, str]]:
    """Model types with the task of each."""
    return [(model_type, SPEECH if model_type == "whisper" else TEXT) for model_type in (*CONFIGS, *REFUSED)]


def make(path: Path, model_type: str, task: str = TEXT) -> Path:
    """A tiny random checkpoint at `path`."""
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type])
    if model_type != "whisper":
        return tiny.save_checkpoint(path, config, transformers.AutoModelForSeq2SeqLM)
    tiny.save_checkpoint(path, config, transformers.AutoModelForSpeechSeq2Seq)
    file = path / "generation_config.json"
    settings = {name: value for name, value in json.loads(file.read_text()).items() if name != "_from_model_config"}
    file.write_text(json.dumps({**settings, **_SPEAKS}))
    return path


def options(model_type: str, task: str) -> dict[str, Any]:
    """The sizes to compile it for."""
    return OPTIONS[task]
