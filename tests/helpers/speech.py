"""A tiny random Whisper that hears half a minute, with a tokenizer, times and languages like published ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
import transformers
from tokenizers import AddedToken, pre_tokenizers

RATE = 16000
LANGUAGES = ("en", "zh", "de", "haw")
_SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
    "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
]  # fmt: skip
_TIMES = [AddedToken(f"<|{index * 0.02:.2f}|>", special=False, normalized=False) for index in range(1501)]


def tokenizer() -> transformers.WhisperTokenizer:
    """Of single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = transformers.WhisperTokenizer(
        vocab={letter: index for index, letter in enumerate(letters)}, merges=[], extra_special_tokens=_SPECIAL[1:]
    )
    found.add_tokens(_TIMES)
    return found


def whisper(path: Path) -> Path:
    """The checkpoint at `path`."""
    words = tokenizer()
    ids = {token: words.convert_tokens_to_ids(token) for token in _SPECIAL}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config = transformers.WhisperConfig(
        vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=1500,
        max_target_positions=64, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
    )  # fmt: skip
    tiny.save_checkpoint(path, config, transformers.AutoModelForSpeechSeq2Seq)
    words.save_pretrained(path)
    (path / "chat_template.jinja").unlink()
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained(path)
    settings = {
        "is_multilingual": True, "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")},
        "no_timestamps_token_id": ids["<|notimestamps|>"], "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False, "max_initial_timestamp_index": 50, "max_length": 48,
        "suppress_tokens": [index for index in ids.values() if index != end], "begin_suppress_tokens": [end],
        "pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start,
    }  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that swells and pauses, as a voice does."""
    count = int(seconds * RATE)
    beat = np.maximum(0.01, np.sin(np.arange(count) / RATE * (1 + seed)))
    return (np.random.default_rng(seed).normal(size=count) * beat * 0.2).astype(np.float32)
