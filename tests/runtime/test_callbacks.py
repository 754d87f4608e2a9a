"""What is called in the middle of generate() — processors, criteria, streamers — and what it is given."""

from __future__ import annotations

import numpy as np
import pytest

from precast.runtime import CompiledModelForCausalLM
from precast.runtime.errors import PrecastError


@pytest.fixture(scope="module")
def wide(checkpoint, artifact):
    return CompiledModelForCausalLM.from_pretrained(
        artifact(checkpoint("llama"), batch_size=3, dynamic_batch_size=True)
    )


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"forced_bos_token_id": 5}])
def test_logits_that_are_no_numbers_are_told_with_their_step(wide, options, monkeypatch):
    """Wherever NaN stands, and whatever else would have been chosen or ruled out."""
    session, decode = wide._session, wide._session.decode

    def spoilt(tokens):
        logits = decode(tokens)
        if len(session.tokens[0]) == 4:
            logits[0, 7] = np.nan
        return logits

    monkeypatch.setattr(session, "decode", spoilt)
    with pytest.raises(PrecastError, match="logits for new token 3 hold NaN"):
        wide.generate([[5, 6]], max_new_tokens=5, eos_token_id=[], suppress_tokens=[7], **options)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"max_new_tokens": 1}, {"num_beams": 2, "max_new_tokens": 1}]
)
def test_a_processor_may_not_use_the_caches_that_it_is_asked_about(wide, rows, options):
    """A second row's logits would be those of that call."""

    def nested(tokens, logits):
        wide.logits_at([np.array([9, 9, 9])], [[2]])
        return logits

    ids, asked = [[5, 6], [7, 8]][:rows], {"max_new_tokens": 4, **options}
    for given in ({"logits_processor": [nested]}, {"stopping_criteria": [lambda *row: nested(*row) is None]}):
        with pytest.raises(PrecastError, match=r"taken over its caches: .* logits_processor .*new_session\(\)"):
            wide.generate(ids, **asked, **given)
    apart = wide.new_session()

    def beside(tokens, logits):
        apart.generate([[9, 9, 9]], max_new_tokens=2)
        return logits

    assert wide.generate(ids, logits_processor=[beside], **asked).tolist() == wide.generate(ids, **asked).tolist()
