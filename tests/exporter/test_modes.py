"""A model answers alike compiled ahead of time, by eager transformers, and by torch.compile."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import count

import numpy as np
import oracle
import pytest
import torch
from click.testing import CliRunner

from precast.cli import cli
from precast.runtime import CompiledModel
from precast.runtime.errors import CheckpointError, InputError, UsageError
from precast.runtime.pipelines.generation import TextGenerationPipeline
from precast.runtime.runner import compare_modes, comparison, open_model
from precast.runtime.runner.comparison_worker import run_mode

ROWS = [[5, 9, 30, 7, 200], [80], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
PROMPTS = ["Water boils at", "The capital of France"]
# qwen2 has a layer that attends to a window.
every_model = pytest.mark.parametrize("model_type", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])


@pytest.fixture
def models(checkpoint, artifact):
    """`models("llama", "eager")`: the model in a mode; batch 3, capacity 48."""

    def make(model_type: str, mode: str, **options):
        source = checkpoint(model_type)
        if mode == "compiled":
            return open_model(artifact(source, batch_size=3), mode)
        return open_model(source, mode, batch_size=3, sequence_length=48, **options)

    return make


def _greedy(model, side="left", **options):
    ids, mask = oracle.padded(ROWS, side)
    found = model.generate(ids, mask, max_new_tokens=10, do_sample=False, **options)
    assert found[:, : ids.shape[1]].tolist() == ids.tolist()
    return found[:, ids.shape[1] :].tolist()


@every_model
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_compiled_and_eager_models_generate_the_same(models, checkpoint, model_type, side):
    expected = [oracle.greedy(checkpoint(model_type), row, max_new_tokens=10) for row in ROWS]
    for mode in ("compiled", "eager"):
        found = _greedy(models(model_type, mode), side)
        assert [row[: len(want)] for row, want in zip(found, expected, strict=True)] == expected


@every_model
def test_logits_of_an_eager_model_are_those_of_each_row_alone(models, checkpoint, model_type):
    model = models(model_type, "eager")
    for side in ("left", "right", "middle"):
        oracle.check_logits(checkpoint(model_type), model, ROWS, side)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_torch_compile_gives_the_same_tokens_and_compiles_once_for_each_shape(models, checkpoint, model_type):
    eager, compiled = models(model_type, "eager"), models(model_type, "torch-compile")
    assert compiled.compile_seconds == 0
    assert _greedy(compiled) == _greedy(eager)
    seconds = compiled.compile_seconds
    assert compiled.compiled_graphs == 1
    # Neither the prompts' lengths, nor how many tokens, nor who steps makes another shape.
    ids, mask = oracle.padded([[*row, 3] for row in ROWS], "right")
    for options in ({"max_new_tokens": 20}, {"max_new_tokens": 3}):
        assert np.array_equal(compiled.generate(ids, mask, **options), eager.generate(ids, mask, **options))
    oracle.check_logits(checkpoint(model_type), compiled, ROWS, "right")
    compiled.warm_up()
    assert (compiled.compiled_graphs, compiled.compile_seconds) == (1, seconds)
    compiled.generate(ids[:1], mask[:1], max_new_tokens=3)
    assert compiled.compiled_graphs == 2
    assert compiled.compile_seconds > seconds > 0


@pytest.mark.slow
def test_what_is_no_single_graph_is_compiled_in_several(models, monkeypatch):
    model, eager = models("llama", "torch-compile"), models("llama", "eager")
    layer = model._inner.module.model.layers[0]
    forward = layer.forward

    def breaks(*args, **options):
        torch._dynamo.graph_break()
        return forward(*args, **options)

    monkeypatch.setattr(layer, "forward", breaks)
    assert _greedy(model) == _greedy(eager)
    assert not model._inner.step.is_whole
    assert model.compiled_graphs > 1


def test_an_eager_model_steps_as_a_compiled_one_does(models):
    rows = [np.array(row) for row in ROWS]
    sessions = [models("llama", mode).session() for mode in ("compiled", "eager")]
    logits = [session.prefill(rows).copy() for session in sessions]
    for step in range(6):
        assert np.abs(logits[0] - logits[1]).max() < 1e-4
        # The second row has ended: nobody reads what it gives.
        tokens = [int(row.argmax()) for row in logits[0]]
        given = [tokens[0], None if step > 2 else tokens[1], tokens[2]]
        logits = [session.decode(given).copy() for session in sessions]
        if step > 2:
            logits = [np.delete(each, 1, 0) for each in logits]
            logits = [np.insert(each, 1, 0, 0) for each in logits]


def test_a_full_cache_is_said(models):
    session = models("llama", "eager").session()
    session.prefill([np.ones(48, np.int64)])
    with pytest.raises(InputError, match="holds 48 tokens"):
        session.decode([1])


def test_sampling_of_an_eager_model_is_that_of_transformers(models, checkpoint):
    model, options = models("llama", "eager"), {"do_sample": True, "top_k": 20, "temperature": 0.7}
    ids = np.array([ROWS[0]])
    found = model.generate(ids, max_new_tokens=8, seed=3, **options)
    torch.manual_seed(3)
    expected = oracle.greedy(checkpoint("llama"), ROWS[0], max_new_tokens=8, **options)
    assert found[0, 5:].tolist()[: len(expected)] == expected
    assert np.array_equal(found, model.generate(ids, max_new_tokens=8, seed=3, **options))


def test_tensors_give_tensors_and_several_answers_repeat_the_prompt(models):
    model, ids = models("llama", "eager"), torch.tensor([ROWS[0], ROWS[0]])
    found = model.generate(ids, max_new_tokens=3, num_return_sequences=2, num_beams=2, do_sample=False)
    assert isinstance(found, torch.Tensor)
    assert found.shape[0] == 4
    assert isinstance(model(ids).logits, torch.Tensor)


def test_the_tokenizer_and_the_pipeline_are_those_of_an_artifact(models):
    compiled, eager = models("llama", "compiled"), models("llama", "eager")
    talk = [{"role": "user", "content": "今天天气很好"}]
    assert compiled.tokenizer(PROMPTS)["input_ids"].tolist() == eager.tokenizer(PROMPTS)["input_ids"].tolist()
    assert compiled.tokenizer.apply_chat_template(talk) == eager.tokenizer.apply_chat_template(talk)
    answers = [TextGenerationPipeline(model)([*PROMPTS, "x"], max_new_tokens=6) for model in (compiled, eager)]
    assert answers[0] == answers[1]


# ------------------------------------------------------------ what is opened, and what is refused


def test_an_artifact_runs_its_checkpoint_where_that_is_found(artifact, checkpoint, tmp_path, monkeypatch):
    source = checkpoint("llama")
    made = artifact(source, batch_size=3)
    with pytest.raises(CheckpointError, match=rf"was compiled from {source.name}, which is neither .*checkpoint=PATH"):
        open_model(made, "eager")
    eager = open_model(made, "eager", checkpoint=str(source))
    assert (eager.batch_size, eager.capacity) == (3, 48)
    (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    assert open_model(made, "eager").name == source.name
    with pytest.raises(CheckpointError, match=r"is not what .* was compiled from: .* weights of sha256"):
        open_model(made, "eager", checkpoint=str(checkpoint("llama", num_hidden_layers=2)))


def test_what_a_mode_cannot_run_is_refused_with_the_command(checkpoint):
    source = checkpoint("llama")
    with pytest.raises(UsageError, match=rf"precast export {source} --batch-size 1 --sequence-length 512 -o OUT"):
        open_model(source)
    with pytest.raises(UsageError, match=r"feature-extraction; without compiling .* precast export"):
        open_model(checkpoint("bert", "AutoModel"), "eager")
    with pytest.raises(UsageError, match=r"no mode 'eagre'. Did you mean 'eager'.*compiled, eager, torch-compile"):
        open_model(source, "eagre")
    with pytest.raises(UsageError, match=r"does not know sequence_lenght. Did you mean sequence_length"):
        open_model(source, "eager", sequence_lenght=3)
    with pytest.raises(UsageError, match="dtype='int8' is not known"):
        open_model(source, "eager", dtype="int8")
    with pytest.raises(UsageError, match=r"says what an artifact was compiled from, and .* is none"):
        open_model(source, "eager", checkpoint=str(source))


def test_a_checkpoint_is_compiled_where_its_length_is_said(checkpoint, artifact, monkeypatch):
    source, asked = checkpoint("llama"), []
    made = artifact(source, batch_size=3)
    monkeypatch.setattr("precast.runtime.models.base.export_once", lambda *model, **how: asked.append(how) or made)
    assert isinstance(open_model(source, sequence_length=16), CompiledModel)
    assert asked[0]["sequence_length"] == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"json_schema": {"type": "object"}}, "does not know json_schema.*mode='compiled'"),
        ({"max_new_tokens": 90}, "Ask for max_new_tokens=43 at most. Open the model with sequence_length=95"),
        ({"max_new_tokens": "x"}, "max_new_tokens='x' is of the wrong type"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ({"output_scores": True}, "does not know output_scores"),
    ],
)
def test_what_transformers_does_not_know_is_refused(models, options, said):
    with pytest.raises(UsageError, match=said):
        models("llama", "eager").generate([ROWS[0]], **options)


def test_without_the_exporter_it_says_what_to_install(checkpoint):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from precast.runtime.runner import open_model\nfrom precast.runtime.errors import UsageError\n"
        "try: open_model(sys.argv[1], 'eager')\nexcept UsageError as error: print(error)"
    )
    words = [sys.executable, "-c", code, str(checkpoint("llama"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "mode='eager' needs the exporter: pip install 'precast[export]'\n"


# ------------------------------------------------------------ comparison


@pytest.fixture
def in_this_process(monkeypatch):
    """Modes are run in this process, by a clock that ticks."""
    ticks = count()
    monkeypatch.setattr(
        comparison, "ask_worker", lambda module, name, job: run_mode(json.loads(json.dumps(job)), lambda: next(ticks))
    )


@pytest.mark.usefixtures("in_this_process")
def test_modes_are_compared(checkpoint, artifact, tmp_path):
    source = checkpoint("llama")
    found = compare_modes(
        PROMPTS, model=source, artifact=artifact(source, batch_size=3), modes=["compiled"], max_new_tokens=6
    )
    eager, compiled = found.results
    assert [each.mode for each in found.results] == ["eager", "compiled"]
    expected = [oracle.greedy(source, ids, max_new_tokens=6) for ids in _ids(source)]
    assert eager.answers == compiled.answers == expected
    assert compiled.is_equal
    assert compiled.tokens == compiled.equal_tokens == sum(map(len, expected))
    assert eager.mean_kl == 0
    assert 0 < compiled.mean_kl < 1e-5
    read = sum(map(len, _ids(source)))
    # Between two looks at the clock is one tick.
    assert compiled.prefill_tokens_per_second == read
    assert (compiled.load_seconds, compiled.warm_up_seconds, compiled.compile_seconds) == (1, 1, None)
    told = json.loads(found.to_json())
    assert told["results"][1]["first_difference"] is None
    assert told["prompts"] == PROMPTS
    assert [column.header for column in found.table().columns] == ["", "eager", "compiled"]
    found.save_chart(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def _ids(source):
    return [open_model(source, "eager").tokenizer.encode(text) for text in PROMPTS]


def test_a_wrong_answer_and_other_distributions_are_found(checkpoint, artifact, monkeypatch):
    """One token and all logits of a compiled model are changed on their way."""

    def ask(module, name, job):
        answer = run_mode(job)
        if job["mode"] == "compiled":
            answer["tokens"][1][2] += 1
            with np.load(job["logits"]) as held:
                flat = [np.zeros_like(held[name]) for name in held.files]
            np.savez(job["logits"], *flat)
        return answer

    monkeypatch.setattr(comparison, "ask_worker", ask)
    source = checkpoint("llama")
    made = artifact(source, batch_size=3)
    found = compare_modes(PROMPTS, model=source, artifact=made, modes=["compiled"], max_new_tokens=6, repeat=1)
    result = found.results[1]
    assert not result.is_equal
    assert (result.first_difference.prompt, result.first_difference.position) == (1, 2)
    assert result.equal_tokens == len(result.answers[0]) + 2
    rows = [_log_softmax(oracle.logits(source, ids)) for ids in _ids(source)]
    values = np.concatenate(rows)
    expected = (np.exp(values) * (values + np.log(values.shape[1]))).sum(1).mean()
    assert result.mean_kl == pytest.approx(expected, rel=1e-4)


def _log_softmax(logits):
    return torch.log_softmax(torch.from_numpy(logits), -1).numpy()


@pytest.mark.parametrize(
    ("expected", "found", "equal", "first"),
    [
        ([[1, 2], [3]], [[1, 2], [3]], 3, None),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], 3, (1, 1, 4, 5)),
        ([[1, 2, 3]], [[1, 2]], 2, (0, 2, 3, None)),
        ([[9], [1]], [[8], [2]], 0, (0, 0, 9, 8)),
    ],
)
def test_tokens_are_counted_up_to_the_first_difference(expected, found, equal, first):
    counted, difference = comparison._compare_tokens(expected, found)
    told = difference and (difference.prompt, difference.position, difference.eager, difference.found)
    assert (counted, told) == (equal, first)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"modes": ["fast"]}, "no mode 'fast'"),
        ({"model": None}, "Name what to run"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ({}, "needs an artifact of .*: precast export .* alone"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(checkpoint, arguments, said):
    asked = {"prompts": PROMPTS, "model": checkpoint("llama"), **arguments}
    with pytest.raises(UsageError, match=said):
        compare_modes(asked.pop("prompts"), **asked)


@pytest.mark.slow
def test_the_command_compares_all_modes_each_in_a_process_of_its_own(checkpoint, artifact, tmp_path):
    source = checkpoint("llama")
    made = str(artifact(source, batch_size=3))
    words = ["compare", str(source), "--artifact", made, "--prompt", PROMPTS[0], "--json", "--max-new-tokens", "6",
             "--repeat", "1", "--png", str(tmp_path / "chart.png"), "--quiet"]  # fmt: skip
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    told = json.loads(done.stdout)
    assert [each["mode"] for each in told["results"]] == ["eager", "compiled", "torch-compile"]
    assert all(each["first_difference"] is None and each["peak_rss_mb"] > 20 for each in told["results"])
    assert told["results"][2]["compile_seconds"] > 0
    assert (tmp_path / "chart.png").stat().st_size > 1000


@pytest.mark.usefixtures("in_this_process")
def test_the_command_shows_a_table(checkpoint, artifact, tmp_path):
    source = checkpoint("llama")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["compare", str(source), "--artifact", str(artifact(source, batch_size=3)), "--modes", "compiled",
             "--input-file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "6", "--repeat", "1"]  # fmt: skip
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    count = sum(len(oracle.greedy(source, ids, max_new_tokens=6)) for ids in _ids(source))
    assert "2 prompts, up to 6 new tokens each" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "tokens equal to eager" in line)
    assert line.split()[-4:] == ["all", str(count)] * 2
