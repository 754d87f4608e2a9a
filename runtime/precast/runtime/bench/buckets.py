"""Choose the lengths to compile for that pad the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

__all__ = ["Plan", "plan_buckets", "waste"]


@dataclass(frozen=True)
class Plan:
    """Lengths to compile for.

    Attributes:
        lengths: ascending; `precast export --sequence-length` takes them.
        padding: the share of tokens that would be padding, 0..1.
        padding_of_one: the same with the longest length alone.
        rows: how many texts each length takes.
        too_long: texts that are longer than all of them, which are not counted.
    """

    lengths: list[int]
    padding: float
    padding_of_one: float
    rows: list[int]
    too_long: int


def plan_buckets(lengths: Sequence[int], count: int, *, multiple: int = 8, longest: int | None = None) -> Plan:
    """The at most `count` lengths that pad texts of these lengths least, every text being padded to the next of them.

    The best that there is, by dynamic programming over the lengths in use (rounded up to `multiple`): with the first m
    of them in k buckets, the cost is the least over the previous bucket's end.

    Args:
        lengths: tokens per text, at least 1 each.
        count: how many lengths, at least 1.
        multiple: of what number each is to be a multiple; 1 is any.
        longest: the most that may be compiled for, as a model's max_position_embeddings; longer texts are left out.

    Raises:
        UsageError: there is no length, or a number is out of range.
    """
    _check_arguments(lengths, count, multiple, longest)
    most = longest // multiple * multiple if longest else None
    fitting = np.array([length for length in lengths if most is None or length <= most])
    if not len(fitting):
        raise UsageError(f"No text fits into {most} tokens; the shortest has {min(lengths)}. Raise longest=.")
    ends, rows = np.unique(-(-fitting // multiple) * multiple, return_counts=True)
    chosen = _choose_ends(ends, rows, min(count, len(ends)))
    return Plan(
        lengths=chosen,
        padding=waste(fitting, chosen),
        padding_of_one=waste(fitting, chosen[-1:]),
        rows=np.bincount(np.searchsorted(chosen, fitting), minlength=len(chosen)).tolist(),
        too_long=len(lengths) - len(fitting),
    )


def waste(lengths: Sequence[int] | np.ndarray, buckets: Sequence[int]) -> float:
    """The share of padding, 0..1, when each text is padded to the smallest bucket (ascending) that holds it."""
    padded = np.array(buckets)[np.searchsorted(buckets, lengths)].sum()
    return float(1 - np.sum(lengths) / padded)


def _choose_ends(ends: np.ndarray, rows: np.ndarray, count: int) -> list[int]:
    """The `count` of `ends` (ascending, the last always) with the least padded tokens in all."""
    below = np.concatenate([[0], np.cumsum(rows)])
    costs = ends * below[1:]
    previous = []
    for _ in range(count - 1):
        # [end, end before]: the cost up to the end before, and that of the rows between the two, padded to `end`.
        table = costs[None] + ends[:, None] * (below[1:, None] - below[None, 1:])
        table[np.triu_indices(len(ends))] = np.iinfo(np.int64).max
        table = np.column_stack([table, costs])
        previous.append(table.argmin(1))
        costs = table.min(1)
    chosen = [len(ends) - 1]
    for step in reversed(previous):
        if step[chosen[0]] < len(ends):
            chosen.insert(0, int(step[chosen[0]]))
    return [int(ends[index]) for index in chosen]


def _check_arguments(lengths: Sequence[int], count: int, multiple: int, longest: int | None) -> None:
    if not len(lengths):
        raise UsageError("There is no text and no length to plan for.")
    if min(lengths) < 1:
        raise UsageError(f"A length is at least 1 token, not {min(lengths)}.")
    for name, value in (("count", count), ("multiple", multiple)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
    if longest is not None and longest < multiple:
        raise UsageError(f"No multiple of {multiple} fits into at most {longest} tokens.")
