"""The language model within one that reads images or sound too: its own code, without what text never reaches.

Asked for text, the whole model's forward pass goes through its language model and head alone. Those are traced and
compiled as of any decoder; what else there is goes, and whatever calls it after all fails.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import transformers
from torch import nn

from precast.runtime.errors import ExportError

__all__ = ["READS_MORE", "keep_language_model", "wider_class"]

READS_MORE = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""transformers' classes of models that are given texts, and images or sound with them."""


class _Absent(nn.Module):
    """What stands where a part was that is for images or sound."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        # Qwen2-Audio asks where its ears are, and sends texts there.
        self.name, self.device = name, device

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise ExportError(f"its {self.name} is part of how it reads text, too")


def wider_class(config: Any) -> Any | None:
    """transformers' class for models of this type whose language model can be had alone; None where there is none: an
    encoder-decoder's answers hang on what it encodes."""
    text = config.get_text_config(decoder=True)
    if text is config or config.is_encoder_decoder or text.is_encoder_decoder:
        return None
    autos = [getattr(transformers, name) for name in READS_MORE]
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)


def keep_language_model(model: Any) -> None:
    """Take the parts out of `model` that lie beside its decoder and its output embedding."""
    kept = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    inner = {id(module) for part in kept for module in part.modules()}
    for parent in [module for module in model.modules() if id(module) not in inner]:
        for name, child in list(parent.named_children()):
            if not any(id(module) in inner for module in child.modules()):
                setattr(parent, name, _Absent(name, model.device))
