"""transformers' own streamers, as they are: of our generate() and pipelines they hear what they hear of eager's."""

from __future__ import annotations

import asyncio
import threading

import oracle
import pytest
import tiny
import torch
import transformers

from precast.runtime import CompiledModelForCausalLM, pipeline
from precast.runtime.errors import InputError

CHINESE = tiny.TEXTS[3]
ASKED = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def source(checkpoint):
    return checkpoint("llama")


@pytest.fixture(scope="module")
def tokenizer(source):
    return transformers.AutoTokenizer.from_pretrained(source)


@pytest.fixture
def model(decoder):
    return CompiledModelForCausalLM.from_pretrained(decoder)


def printed(call, tokenizer, capsys, **how):
    capsys.readouterr()
    call(transformers.TextStreamer(tokenizer, **how))
    return capsys.readouterr().out


def iterated(call, tokenizer, capsys, **how):
    streamer = transformers.TextIteratorStreamer(tokenizer, timeout=60, **how)
    thread = threading.Thread(target=call, args=[streamer])
    thread.start()
    found = list(streamer)
    thread.join()
    return found


def awaited(call, tokenizer, capsys, **how):
    async def collect():
        streamer = transformers.AsyncTextIteratorStreamer(tokenizer, timeout=60, **how)
        running = asyncio.create_task(asyncio.to_thread(call, streamer))
        found = [piece async for piece in streamer]
        await running
        return found

    return asyncio.run(collect())


def word_for_word(tokenizer, text):
    """A function that lets an answer be this text and nothing else."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = []

    def allowed(_, tokens):
        start.append(len(tokens))
        return [ids[(len(tokens) - start[0]) % len(ids)]]

    return allowed


@pytest.mark.parametrize("hear", [printed, iterated, awaited], ids=lambda hear: hear.__name__)
@pytest.mark.parametrize("how", [{}, {"skip_prompt": True}, {"skip_special_tokens": True}], ids=",".join)
@pytest.mark.parametrize("answer", [None, CHINESE, "one word\nand a line — 天。"], ids=["greedy", "chinese", "lines"])
def test_a_streamer_hears_what_it_hears_of_eager(model, source, tokenizer, capsys, hear, how, answer):
    """Piece by piece, from generate() and from the pipeline."""

    def told():
        forced = {} if answer is None else {"prefix_allowed_tokens_fn": word_for_word(tokenizer, answer)}
        return {**ASKED, **forced}

    eager = oracle.eager(source)
    ids = tokenizer(CHINESE, return_tensors="pt")
    with torch.inference_mode():
        expected = hear(lambda streamer: eager.generate(**ids, **told(), streamer=streamer), tokenizer, capsys, **how)
    assert "".join(expected).strip()
    for given in (ids, {"input_ids": ids["input_ids"].numpy()}):
        found = hear(
            lambda streamer, given=given: model.generate(**given, **told(), streamer=streamer),
            tokenizer, capsys, **how,
        )  # fmt: skip
        assert found == expected
    pipe = pipeline("text-generation", model)
    assert hear(lambda streamer: pipe(CHINESE, **told(), streamer=streamer), tokenizer, capsys, **how) == expected


class Failing(transformers.TextStreamer):
    """Loses its listener after some pieces."""

    def __init__(self, tokenizer, count):
        super().__init__(tokenizer)
        self.count, self.has_ended = count, False

    def put(self, value):
        self.count -= 1
        if not self.count:
            raise BrokenPipeError("nobody listens")

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_a_streamer_raises_ends_the_call(model, tokenizer, count):
    """At the prompt, at the first token and in the middle; the next call is as any other, and it hears of no end."""
    expected = model.generate([[5, 9, 30]], **ASKED).tolist()
    streamer = Failing(tokenizer, count)
    with pytest.raises(BrokenPipeError, match="nobody listens"):
        model.generate([[5, 9, 30]], streamer=streamer, **ASKED)
    assert not streamer.has_ended
    assert model.generate([[5, 9, 30]], **ASKED).tolist() == expected


def test_what_is_raised_in_the_middle_leaves_a_streamer_without_an_end(model, source, tokenizer):
    """As transformers does: who iterates over it is told by its timeout."""
    eager, heard = oracle.eager(source), []
    for generate in (model.generate, eager.generate):
        streamer = transformers.TextIteratorStreamer(tokenizer, timeout=0)

        def give_up(_, tokens):
            if len(tokens) == 6:
                raise KeyError("in the middle")
            return [70, 71]

        with pytest.raises(KeyError, match="in the middle"), torch.inference_mode():
            generate(
                torch.tensor([[5, 9, 30]]), prefix_allowed_tokens_fn=give_up, streamer=streamer, **ASKED
            )  # fmt: skip
        heard.append([streamer.text_queue.get_nowait() for _ in range(streamer.text_queue.qsize())])
    assert heard[0] == heard[1]
    assert len(heard[0]) == 4
    assert None not in heard[0]


def test_a_streamer_follows_one_row(source, artifact, tokenizer, capsys):
    """Several are a ValueError, as there; prompts of a pipeline are streamed one after the other."""
    wide = CompiledModelForCausalLM.from_pretrained(artifact(source, batch_size=3, dynamic_batch_size=True))
    rows, streamer = torch.tensor([[5, 9], [6, 7]]), transformers.TextStreamer(tokenizer)
    with pytest.raises(ValueError, match="batch size 1"), torch.inference_mode():
        oracle.eager(source).generate(rows, streamer=streamer, **ASKED)
    with pytest.raises(InputError, match="A streamer follows one row; this batch has 2") as refused:
        wide.generate(rows, streamer=streamer, **ASKED)
    assert isinstance(refused.value, ValueError)
    pipe = pipeline("text-generation", wide)
    prompts = [CHINESE, "Water"]
    with pytest.raises(InputError, match="A streamer follows one row; this batch has 2"):
        pipe(prompts, streamer=streamer, **ASKED)
    alone = [printed(lambda told, each=each: pipe(each, streamer=told, **ASKED), tokenizer, capsys) for each in prompts]
    both = printed(lambda told: pipe(prompts, batch_size=1, streamer=told, **ASKED), tokenizer, capsys)
    assert both == "".join(alone)
