"""Between how many ranks a model's weights are divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .backend_options import BackendOptions
from .declaration import describe

__all__ = ["DEGREES", "Degrees", "ParallelOptions", "PipelineOptions"]

_SECTION = "Parallel"
_ONE_PROCESS = "one process runs its models, with all of the weights"

DEGREES = {
    "attn": "attention's queries, keys and values",
    "o_proj": "attention's output layers",
    "mlp": "dense blocks",
    "moe": "experts",
    "embed": "the table of tokens",
    "lmhead": "the output layer",
}
"""Kinds of modules that may have fewer parts than there are ranks, by the names of their options without `_tp`."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many parts modules of each kind have between `ranks`; each divides their number. Where there are fewer parts
    than ranks, ranks one after the other have the same part, and compute the same.

    Attributes:
        attn: attention's queries, keys and values.
        o_proj: its output layer.
        mlp: dense blocks.
        moe: experts.
        by_expert: the parts of experts are whole experts, and not a part of each.
        embed: the table of tokens.
        lmhead: the output layer.
    """

    ranks: int
    attn: int
    o_proj: int
    mlp: int
    moe: int
    embed: int
    lmhead: int
    by_expert: bool = False

    def copies(self, kind: str) -> int:
        """Of how many ranks each part of a module of this kind is."""
        return self.ranks // int(getattr(self, kind))

    def fewer(self) -> dict[str, int]:
        """Those that are fewer than there are ranks, and experts that are divided by their numbers."""
        named = {"moe_ep" if kind == "moe" and self.by_expert else kind: getattr(self, kind) for kind in DEGREES}
        return {kind: value for kind, value in named.items() if value < self.ranks or kind == "moe_ep"}

    def described(self, kind: str) -> str:
        """The option that says the degree of a kind, as messages have it."""
        value = getattr(self, kind)
        if kind == "moe" and self.by_expert:
            return f"moe_ep={value}"
        return f"{kind}_tp={value}" if value < self.ranks else f"tensor_parallel={self.ranks}"


def _degree(kind: str) -> int | None:
    degree: int | None = field(
        default=None,
        metadata=describe(
            section=_SECTION, metavar="N", help_text=f"Divide {DEGREES[kind]} into N parts only.", because=_ONE_PROCESS
        ),
    )
    return degree


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(BackendOptions):
    """The options of a backend that compiles for several ranks.

    Attributes:
        tensor_parallel: how many ranks, each of which has a part of every layer's weights.
        attn_tp, o_proj_tp, mlp_tp, moe_tp, embed_tp, lmhead_tp: into how many parts modules of one kind are divided,
            where these are fewer than ranks; see DEGREES.
        moe_ep: into how many parts experts are divided by their numbers, each part of whole experts.
        online_split: keep weights whole in one file, of which each rank reads its parts.
    """

    tensor_parallel: int = field(
        default=1,
        metadata=describe(
            section=_SECTION,
            flags=("--tensor-parallel", "--num-cores"),
            metavar="N",
            help_text="Divide each layer's weights between N processes, or NeuronCores.",
            because=_ONE_PROCESS,
        ),
    )
    attn_tp: int | None = _degree("attn")
    o_proj_tp: int | None = _degree("o_proj")
    mlp_tp: int | None = _degree("mlp")
    moe_tp: int | None = _degree("moe")
    moe_ep: int | None = field(
        default=None,
        metadata=describe(section=_SECTION, metavar="N", help_text="Divide experts by their numbers into N parts."),
    )
    embed_tp: int | None = _degree("embed")
    lmhead_tp: int | None = _degree("lmhead")
    online_split: bool = field(
        default=False,
        metadata=describe(
            section=_SECTION, help_text="Keep weights whole, of which each rank reads its parts.", because=_ONE_PROCESS
        ),
    )

    @property
    def is_parallel(self) -> bool:
        """Whether there are several ranks."""
        return self.tensor_parallel > 1

    @property
    def instead_of_ranks(self) -> str:
        """What to do with a model that cannot be divided, the end of a message."""
        return "Leave it out"

    def name_parts(self) -> Sequence[str]:
        """See BackendOptions."""
        return [f"tp{self.tensor_parallel}"] if self.is_parallel else []

    @property
    def degrees(self) -> Degrees:
        """The parts of each kind of modules."""
        given = {kind: getattr(self, f"{kind}_tp") for kind in DEGREES}
        given["o_proj"] = given["o_proj"] or given["attn"]
        by_expert = (self.moe_ep or 1) > 1
        given["moe"] = self.moe_ep if by_expert else given["moe"]
        parts = {kind: value or self.tensor_parallel for kind, value in given.items()}
        return Degrees(ranks=self.tensor_parallel, by_expert=by_expert, **parts)

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        ranks, names = self.tensor_parallel, [*(f"{kind}_tp" for kind in DEGREES), "moe_ep"]
        if ranks < 1:
            yield f"tensor_parallel must be at least 1, not {ranks}."
            return
        if ranks == 1 and (useless := self.given(*names, "online_split")):
            yield f"{' and '.join(useless)} say how weights are divided between ranks; give tensor_parallel=2, say."
            return
        if (self.moe_tp or 1) > 1 and (self.moe_ep or 1) > 1:
            yield "moe_tp divides each expert, and moe_ep gives each rank whole ones; pass one of them."
        divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        for name in names:
            value = getattr(self, name)
            if value is not None and (value < 1 or ranks % value):
                yield f"{name}={value} does not divide the {ranks} ranks of tensor_parallel; possible are {divisors}."


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(BackendOptions):
    """The options of a backend whose programs can be cut between layers.

    Attributes:
        pipeline_parallel: into how many stages, each run by a process of its own.
    """

    pipeline_parallel: int = field(
        default=1,
        metadata=describe(section=_SECTION, metavar="N", help_text="Divide the layers between N processes."),
    )

    def problems(self) -> Iterator[str]:
        """See OptionsPart."""
        if self.pipeline_parallel < 1:
            yield f"pipeline_parallel must be at least 1, not {self.pipeline_parallel}."

    def name_parts(self) -> Sequence[str]:
        """See BackendOptions."""
        return [f"pp{self.pipeline_parallel}"] if self.pipeline_parallel > 1 else []
