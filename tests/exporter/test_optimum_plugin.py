"""optimum's command line and its TasksManager know precast."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers
from click.testing import CliRunner

from precast.cli import cli
from precast.exporter.support import infer_task, supported_tasks, table

COMMAND = "import sys; sys.argv[0] = 'optimum-cli'; from optimum.commands.optimum_cli import main; main()"


def ask(*words):
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command_takes_what_precast_export_takes():
    assert "precast" in ask("export", "-h")[1]
    code, out, _ = ask("export", "precast", "-h")
    assert (code, out.splitlines()[0]) == (0, "Usage: precast export [OPTIONS] MODEL")
    code, _, err = ask("export", "precast", "--batch-size", "0", "./nothing", "-o", "out")
    assert code == 2
    assert "--batch-size must be at least 1, not 0." in err


def test_the_tasks_manager_knows_what_the_table_of_support_knows():
    from optimum.exporters.tasks import TasksManager

    import optimum.exporters.precast  # noqa: F401

    registered = {
        (model_type, task)
        for model_type, exporters in TasksManager._SUPPORTED_MODEL_TYPE.items()
        for task in exporters.get("precast", ())
    }
    assert registered == {(line.model_type, line.task) for line in table() if line.passes}
    made = TasksManager.get_exporter_config_constructor(
        "precast", model_type="bert", task="multiple-choice", library_name="transformers"
    )
    config = made(transformers.BertConfig())
    assert (config.task, config.mandatory_axes) == ("multiple-choice", ("batch_size", "num_choices", "sequence_length"))
    with pytest.raises(KeyError):
        TasksManager.get_supported_tasks_for_model_type("nothing", "precast", library_name="transformers")


def test_the_task_and_its_sizes_are_found_as_in_the_guide_of_optimum_neuron(checkpoint):
    """Its two queries, and `precast tasks` says the same of the same model."""
    from optimum.exporters.tasks import TasksManager

    import optimum.exporters.precast  # noqa: F401

    path = checkpoint("bert", "AutoModelForSequenceClassification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    task = TasksManager.infer_task_from_model(model)
    assert task == "text-classification"
    made = TasksManager.get_exporter_config_constructor("precast", model=model, task=task)
    axes = made.func.get_mandatory_axes_for_task(task)
    assert axes == made(model.config).mandatory_axes == ("batch_size", "sequence_length")
    told = CliRunner().invoke(cli, ["tasks", str(path), "--json"])
    (line,) = (line for line in json.loads(told.stdout)["tasks"] if line["inferred"])
    assert (line["task"], tuple(line["axes"])) == (task, axes)
    assert infer_task(model.config.to_dict()) == task
    assert supported_tasks("bert")[task].axes == axes
