"""transformers' GenerationTesterMixin, with our `generate` in the place of theirs.

Each call exports the tester's model first. What is deterministic is compared with eager's answer to the same call,
which the suite itself does not do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, set_seed

from . import compiled, tally

EAGER: Callable[..., Any] = GenerationMixin.generate
# What a call asks to be told besides the tokens; where ours refuses that, the tokens are compared all the same.
_REPORTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
_CLASSES = "Generate{beam}{kind}Output"


def generate(model: Any, inputs: Any = None, generation_config: Any = None, **given: Any) -> Any:
    """As `GenerationMixin.generate`, by an export of `model`."""
    tally.reached()
    given = _padded_left(model, {**given, "inputs": inputs, "generation_config": generation_config})
    # GPT-2's tester has them for all calls, and that they are refused needs saying once.
    given.pop("token_type_ids", None)
    ours = compiled.compiled(model)
    ours.generation_config = model.generation_config
    tokens_only = {name: value for name, value in given.items() if name not in _REPORTS}
    answer = ours.generate(**tokens_only)
    if not _is_drawn(model, given):
        _compare(answer, EAGER(model, **tokens_only))
    return _as_theirs(model, ours.generate(**given) if tokens_only != given else answer, given)


def _padded_left(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """With the padding of a decoder's prompts before them: theirs continues what is behind, and warns of it,
    and ours each row as it is without. The suite turns masks round, too, where it compares answers.

    Decoders of encoder-decoders, as BartForCausalLM, are told no positions and count padding as well, which the suite
    does not expect to work: their rows are whole."""
    mask = given.get("attention_mask")
    if model.config.is_encoder_decoder or mask is None or mask.ndim != 2 or mask[:, -1].all():
        return given
    is_told = "position_ids" in inspect.signature(model.forward).parameters
    return {**given, "attention_mask": mask.flip(1) if is_told else torch.ones_like(mask)}


def _setting(model: Any, given: dict[str, Any], name: str) -> Any:
    for config in (given, given["generation_config"], model.generation_config):
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _is_drawn(model: Any, given: dict[str, Any]) -> bool:
    return bool(_setting(model, given, "do_sample"))


def _compare(ours: Any, eager: Any) -> None:
    if hasattr(eager, "sequences"):
        for name in ("sequences", "sequences_scores"):
            if name in eager and name in ours:
                np.testing.assert_allclose(ours[name], eager[name], rtol=1e-4, atol=1e-4, err_msg=name)
    else:
        assert ours.tolist() == eager.tolist(), f"ours {ours.tolist()}, eager {eager.tolist()}"


def _as_theirs(model: Any, answer: Any, given: dict[str, Any]) -> Any:
    """Of the class by which a suite asks what kind of answer it is; the fields are ours."""
    if not hasattr(answer, "sequences"):
        return answer
    import transformers.generation as theirs

    kind = "EncoderDecoder" if model.config.is_encoder_decoder else "DecoderOnly"
    beam = "Beam" if (_setting(model, given, "num_beams") or 1) > 1 else ""
    return getattr(theirs, _CLASSES.format(beam=beam, kind=kind))(**answer)


def pytest_configure() -> None:
    GenerationMixin.generate = generate


def pytest_runtest_setup() -> None:
    """Let each test begin with the same random numbers: it can be repeated, and equal models are exported once."""
    from tests.test_modeling_common import global_rng

    set_seed(0)
    global_rng.seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only what the mixin tests, not what a model's own class or the common tests do."""
    from tests.generation.test_utils import GenerationTesterMixin

    names = {name for name in dir(GenerationTesterMixin) if name.startswith("test_")}
    chosen = [item for item in items if getattr(item, "originalname", item.name) in names]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
