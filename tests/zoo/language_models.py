"""Models that read images or sounds with their texts: those whose language model alone is tried, and what their tiny
configurations need beyond small sizes. What transformers lists for text generation is among the decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from zoo import decoders
from zoo.shrink import tiny_config

from precast.exporter.checkpoint.language_model import multimodal_class


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Rotary positions in parts, one for each coordinate."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes), **more}
    return {"text_config": {"rope_parameters": rope}}


CONFIGS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in ("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "exaone4_5", "granite_speech", "idefics2",
                     "idefics3", "internvl", "janus", "lfm2_vl", "lighton_ocr", "llava", "llava_next",
                     "llava_next_video", "llava_onevision", "minicpmv4_6", "minimax_m3_vl", "mistral3", "ovis2",
                     "paligemma", "qianfan_ocr", "qwen2_audio", "qwen3_asr", "smolvlm", "video_llama_3",
                     "video_llava", "vipllava", "voxtral")
    },
    **dict.fromkeys(
        ["glm46v", "glm4v", "glm_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"],
        _sections(2, 3, 3),
    ),
    "qwen2_vl": _sections(2, 3, 3) | {"vision_config": {"embed_dim": 64}},
    "glm4v_moe": _sections(1, 1, 2, partial_rotary_factor=0.5),
}  # fmt: skip
"""Changes to the machine-made tiny configuration, by model type."""

_IMAGES = "each of its texts goes with an image"
REFUSED: dict[str, str] = {
    "blip": _IMAGES,
    "blip-2": _IMAGES,
    "qwen2_5_omni": "it is several models in one, without a forward pass of its own",
}
"""Model types that cannot be exported, each with the reason in one line for users."""


def pairs() -> list[tuple[str, str]]:
    """Every type with the one task."""
    return [(model_type, "text-generation") for model_type in (*CONFIGS, *REFUSED)]


def make(path: Path, model_type: str, task: str = "text-generation") -> Path:
    """A tiny random checkpoint at `path`, with what reads images or sounds."""
    config = tiny_config(model_type, CONFIGS.get(model_type))
    auto = multimodal_class(config)
    assert auto is not None, f"transformers has no language model in {model_type}"
    return tiny.save_checkpoint(path, config, auto)


options = decoders.options
