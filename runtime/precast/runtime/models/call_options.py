"""The options that a call of any transformers model takes besides its inputs: accepted, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from ..inputs.padding import as_array
from ..inputs.tensors import to_numpy

__all__ = ["check_positions", "without_switches"]

Array = np.ndarray[Any, Any]

_OFF = ("output_attentions", "output_hidden_states", "output_router_logits")


def without_switches(given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Split a call's arguments into the model's own and whether the answer has names, rather than being a tuple.

    None is as good as not given. Raises InputError for an output that a compiled model no longer gives.
    """
    own = {name: value for name, value in given.items() if value is not None}
    is_named = own.pop("return_dict", True)
    # Where there is a cache it is the model's own, and the answer is the one without.
    own.pop("use_cache", None)
    for name in _OFF:
        if own.pop(name, False):
            raise InputError(f"{name}=True: the model was compiled with its answer alone. Leave {name} out.")
    return own, bool(is_named)


def check_positions(given: Any, mask: Array) -> None:
    """Raise InputError for position_ids [batch, length] or [1, length] other than those that the rows' mask gives,
    which are those that the model counts itself."""
    if given is None:
        return
    positions, counted = as_array(to_numpy(given), "position_ids"), mask.cumsum(-1) - 1
    fits = positions.ndim == 2 and positions.shape[0] in (1, len(mask)) and positions.shape[1] == mask.shape[1]
    if not fits or np.any((positions != counted) & mask):
        raise InputError(
            f"position_ids are counted by the model itself, over attention_mask: the first row's are "
            f"{counted[0][mask[0]].tolist()!s:.40}, and these are others. Leave position_ids out."
        )
