"""Settings of transformers' GenerationConfig that this runtime lacks, and which of them would change an answer.

Published files carry whatever the library that wrote them had, so a value counts only where transformers would heed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["HARMLESS", "OUTPUTS", "SPEECH", "UNSUPPORTED", "find_unsupported"]

HARMLESS = frozenset(
    [
        "_attn_implementation",
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "num_assistant_tokens_schedule",
        "prefill_chunk_size",
        "return_legacy_cache",
        "speculation_type",
        "target_lookbehind",
        "tokenizer",
        "transformers_version",
        # The compiled cache is always used, and the answer is the one without.
        "use_cache",
    ]
)
"""How transformers computes, not what: any value gives the same tokens."""

_OFF: tuple[Any, ...] = (None, False)
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    # Arguments of decoders, whose generate() takes them by name.
    **dict.fromkeys(["assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask"], (None,)),
    "constraints": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "synced_gpus": _OFF,
    "token_healing": _OFF,
    "use_mtp": _OFF,
    "watermarking_config": (None,),
}
_BEAMS: dict[str, tuple[Any, ...]] = {"diversity_penalty": (None, 0.0), "num_beam_groups": (None, 1)}
_GREEDY: dict[str, tuple[Any, ...]] = {"penalty_alpha": (None, 0.0)}
OUTPUTS: dict[str, tuple[Any, ...]] = dict.fromkeys(["output_attentions", "output_hidden_states"], _OFF)
"""Outputs besides the tokens, returned where return_dict_in_generate is set."""

SPEECH: dict[str, Any] = {
    **dict.fromkeys(["lang_to_id", "task_to_id"], dict[str, int]),
    "language": str | list[str],
    "task": str,
    **dict.fromkeys(["is_multilingual", "return_timestamps"], bool),
    "forced_decoder_ids": list[tuple[int, int | None]],
    "no_timestamps_token_id": int,
    **dict.fromkeys(["prev_sot_token_id", "max_initial_timestamp_index"], int),
    **dict.fromkeys(["compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"], float),
    "condition_on_prev_tokens": bool,
}
"""Settings that Whisper alone reads, with their types; other models ignore them."""

_WHY = {
    "watermarking_config": (
        ": which tokens it prefers follows from PyTorch's random generator, which whoever detects it asks again. Where "
        "torch is installed, pass transformers' WatermarkLogitsProcessor among logits_processor"
    ),
}
"""Why some are refused, and what there is instead."""

UNSUPPORTED = frozenset([*_ALWAYS, *_BEAMS, *_GREEDY, *OUTPUTS])


def find_unsupported(given: Mapping[str, Any], *, beams: int, samples: bool, returns_outputs: bool) -> Iterator[str]:
    """Yield a sentence for each of the settings `given` that would change the answer: transformers heeds some only with
    beams, with sampling or without, or where outputs besides the tokens are returned."""
    heeded = dict(_ALWAYS)
    heeded |= _BEAMS if beams > 1 else {}
    heeded |= _GREEDY if beams == 1 and not samples else {}
    heeded |= OUTPUTS if returns_outputs else {}
    for name, value in given.items():
        if name in heeded and value not in heeded[name]:
            why, off = _WHY.get(name, ""), heeded[name][-1]
            yield f"{name}={value!r:.80} is not done by this runtime{why}. Pass {name}={off!r} to go without."
