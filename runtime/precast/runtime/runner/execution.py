"""How the execution modes of runners for other hardware are run here, and which of their settings mean nothing here."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UsageError
from .modes import MODES

__all__ = ["EXECUTION_MODES", "ExecutionMode", "find_execution_mode", "log", "note_ignored", "rank_options"]

log = logging.getLogger("precast.runner")


class ExecutionMode(NamedTuple):
    """What an `exe_mode` is here.

    Attributes:
        mode: one of MODES.
        note: what is different from where the name comes from; logged once, None where nothing is.
    """

    mode: str
    note: str | None = None

    @property
    def has_graph(self) -> bool:
        """Whether something is compiled."""
        return self.mode != "eager"


_NO_CAPTURE = "exe_mode={name}: nothing is captured and replayed here; the compiled graph is run as with ge_graph."
EXECUTION_MODES: dict[str, ExecutionMode] = {
    "eager": ExecutionMode("eager"),
    "ge_graph": ExecutionMode("compiled"),
    "npugraph_ex": ExecutionMode("compiled", _NO_CAPTURE),
    "acl_graph": ExecutionMode("compiled", _NO_CAPTURE),
    "compiled": ExecutionMode("compiled"),
    "torch-compile": ExecutionMode("torch-compile"),
}
"""Execution modes by the names that settings give them; the last two are our own."""


def find_execution_mode(name: Any) -> ExecutionMode:
    """The mode of this name. Raises UsageError, which lists them."""
    if name not in EXECUTION_MODES:
        guess = difflib.get_close_matches(str(name), EXECUTION_MODES, n=1)
        hint = f" Did you mean {guess[0]!r}?" if guess else ""
        raise UsageError(f"exe_mode={name!r:.80} is not known.{hint} Choose one of: {', '.join(EXECUTION_MODES)}.")
    found = EXECUTION_MODES[name]
    assert found.mode in MODES, "every name stands for a mode"
    if found.note:
        log.info(found.note.format(name=name))
    return found


_DEGREES = {"attn_tp_size": "attn_tp", "moe_tp_size": "moe_tp", "moe_ep_size": "moe_ep", "embed_tp_size": "embed_tp",
            "lmhead_tp_size": "lmhead_tp", "dense_tp_size": "mlp_tp", "o_proj_tp_size": "o_proj_tp"}  # fmt: skip
"""Sizes of parallel groups, and the options of an export that say them."""


def rank_options(world_size: int, sizes: Mapping[str, int], mode: ExecutionMode) -> dict[str, int]:
    """The options of an export for so many ranks; empty for one.

    Raises UsageError, which names the sizes, where they do not fit each other or cannot be had.
    """
    for name, size in {"world_size": world_size, **sizes}.items():
        if type(size) is not int or size < 1:
            raise UsageError(f"{name} must be a whole number from 1, not {size!r:.80}.")
    for name, size in sizes.items():
        if world_size % size:
            raise UsageError(f"world_size={world_size} is not a multiple of {name}={size}.")
    if world_size == 1:
        return {}
    sizes = {name: size for name, size in sizes.items() if name in _DEGREES or size > 1}
    if others := [name for name in sizes if name not in _DEGREES]:
        raise UsageError(
            f"{others[0]}={sizes[others[0]]}: weights are divided between ranks by attn_tp_size and the like, and "
            f"nothing else is. Pass {others[0]}=1."
        )
    if mode.mode != "compiled":
        raise UsageError(
            f"world_size={world_size} asks for several processes, which run what is compiled. Pass "
            f"exe_mode='ge_graph', or world_size=1."
        )
    return {"tensor_parallel": world_size, **{_DEGREES[name]: size for name, size in sizes.items()}}


def note_ignored(given: Mapping[str, Any], meanings: Mapping[str, str]) -> None:
    """Log a line for every setting given that has no effect here, with the reason from `meanings`."""
    for name, value in given.items():
        if name in meanings:
            log.warning("%s=%r has no effect here: %s", name, value, meanings[name])
