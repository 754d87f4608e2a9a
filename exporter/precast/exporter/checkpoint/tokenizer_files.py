"""Save a tokenizer as the runtime reads it: tokenizer.json, and a tokenizer_config.json with every setting in effect.

transformers leaves settings out of tokenizer_config.json that are defaults of a tokenizer's class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .python_tokenizers import convert_tokenizer

__all__ = ["save_tokenizer"]

_EFFECTIVE = ("padding_side", "truncation_side", "model_input_names", "model_max_length", "pad_token_type_id",
              "split_special_tokens", "clean_up_tokenization_spaces")  # fmt: skip
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def save_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Save a tokenizer of transformers in `folder`; returns its tokenizer_config.json with all settings in effect."""
    tokenizer.save_pretrained(folder)
    written: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if not tokenizer.is_fast and (made := convert_tokenizer(tokenizer)):
        made.tokenizer.save(str(folder / "tokenizer.json"))
        written |= made.settings
        if tokenizer.clean_up_tokenization_spaces:
            # Tokenizers in Python clean up byte pairs as well.
            written |= {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    effective = {name: getattr(tokenizer, name, None) for name in _EFFECTIVE}
    roles = {role: getattr(tokenizer, role, None) for role in _ROLES}
    found = {**effective, **{role: None if token is None else str(token) for role, token in roles.items()}}
    return {**written, **{name: value for name, value in found.items() if value is not None and name not in written}}
