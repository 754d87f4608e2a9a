"""The first layers of a Llama-shaped checkpoint as one of its own, a draft: `… MODEL.gguf DIRECTORY [LAYERS]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, target: str, layers: str = "4") -> None:
    """Write it."""
    file = Path(model)
    whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = whole.config
    config.num_hidden_layers = int(layers)
    config.quantization_config = None
    cut = type(whole)(config)
    cut.load_state_dict({name: value for name, value in whole.state_dict().items() if name in cut.state_dict()})
    cut.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
