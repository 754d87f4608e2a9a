"""The language model within a model of images or sound and text: the same code without the parts that text never uses.

Given text only, the whole model's forward pass goes through its language model and head alone. These are traced and
compiled like any decoder; all other parts are taken out, and a call of one fails.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import transformers
from torch import nn

from precast.runtime.errors import ExportError

__all__ = ["MULTIMODAL_CLASSES", "keep_language_model", "multimodal_class"]

MULTIMODAL_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""transformers' auto classes for models of texts with images or sound."""


class _Absent(nn.Module):
    """In the place of a part for images or sound: raises ExportError when it is called."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        # Qwen2-Audio moves texts to the device of its audio encoder.
        self.name, self.device = name, device

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise ExportError(f"its {self.name} is part of how it reads text, too")


def multimodal_class(config: Any) -> Any | None:
    """transformers' auto class for models of this type, where their language model can be compiled alone; None where it
    cannot, as an encoder-decoder's answers depend on what it encodes."""
    text = config.get_text_config(decoder=True)
    if text is config or config.is_encoder_decoder or text.is_encoder_decoder:
        return None
    autos = [getattr(transformers, name) for name in MULTIMODAL_CLASSES]
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)


def keep_language_model(model: Any) -> None:
    """Take out of `model` all parts but its decoder and its output embedding."""
    kept = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    inner = {id(module) for part in kept for module in part.modules()}
    for parent in [module for module in model.modules() if id(module) not in inner]:
        for name, child in list(parent.named_children()):
            if not any(id(module) in inner for module in child.modules()):
                setattr(parent, name, _Absent(name, model.device))
