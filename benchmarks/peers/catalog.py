"""The peers: where each lives, what runs it, and which scheme of ours it is to be compared with.

Only the standard library is used here. Everything is made by `peers/make.py` in build/peers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CHECKPOINT",
    "COMPLETE",
    "CTRANSLATE2",
    "GENAI",
    "LLAMA",
    "OPENVINO",
    "PEERS",
    "TRANSFORMERS",
    "Peer",
    "peers",
    "problem_file",
]

PEERS = Path(__file__).resolve().parents[2] / "build" / "peers"
# In an environment that was installed to the end.
COMPLETE = "complete"
CHECKPOINT = PEERS / "smollm2-hf"
GENAI, OPENVINO, LLAMA, CTRANSLATE2 = "onnxruntime-genai", "openvino-genai", "llama-cpp-python", "ctranslate2"
# This one has no environment of its own: it is what precast exports with.
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Peer:
    """A library with a model at one precision.

    Attributes:
        scheme: `fp32`, `int8`, `int4` or `source`, which is what the checkpoint itself holds; else its type.
        module: its side of the protocol.
        arguments: for the module, after the model and the number of threads.
    """

    name: str
    library: str
    scheme: str
    module: str
    model: Path
    arguments: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """The interpreter that has the library."""
        return Path(sys.executable) if self.library == TRANSFORMERS else PEERS / self.library / "bin" / "python"

    def problem(self) -> str | None:
        """Why it cannot take part, if so."""
        needed = {self.model.name: self.model}
        if self.library != TRANSFORMERS:
            needed = {self.library: PEERS / self.library / COMPLETE} | needed
        for name, part in needed.items():
            if not part.exists():
                notice = problem_file(name)
                reason = notice.read_text("utf-8") if notice.exists() else "not there (`make peers` installs it)"
                return f"{self.name}: {reason.strip()}"
        return None


def problem_file(name: str) -> Path:
    """Where `make.py` leaves the reason why an environment or a model could not be made."""
    return PEERS / f"{name}.problem"


def peers(gguf: Path) -> list[Peer]:
    """All of them; `gguf` is the checkpoint, which llama.cpp runs as it is."""
    genai = [Peer(f"onnxruntime-genai {each}", GENAI, each, "peers.genai", PEERS / f"smollm2-genai-{each}")
             for each in ("fp32", "int8", "int4")]  # fmt: skip
    # Its fp32 weights are computed with in bf16 where the CPU can: that is its default.
    openvino = [Peer(f"OpenVINO GenAI {each}", OPENVINO, each, "peers.ov", PEERS / f"smollm2-openvino-{each}")
                for each in ("fp32", "int8", "int4")]  # fmt: skip
    ctranslate2 = [Peer(f"CTranslate2 {each}", CTRANSLATE2, each, "peers.ct2", PEERS / f"smollm2-ctranslate2-{each}")
                   for each in ("fp32", "int8")]  # fmt: skip
    llama = Peer("llama.cpp Q4_1", LLAMA, "source", "peers.llama", gguf)
    return [*genai, *openvino, llama, *ctranslate2, *_transformers()]


def _transformers() -> list[Peer]:
    ways = {"eager": "eager", "torch.compile": "compiled"}
    types = {"fp32": "float32", "bf16": "bfloat16"}
    module = "contenders.eager_decode"
    return [
        Peer(f"{way} {scheme}", TRANSFORMERS, scheme, module, CHECKPOINT, (types[scheme], ways[way]))
        for way in ways
        for scheme in types
    ]
