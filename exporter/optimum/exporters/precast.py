"""precast in optimum's TasksManager, under the exporter's name "precast": importing this module registers it.

    import optimum.exporters.precast
    from optimum.exporters.tasks import TasksManager

    TasksManager.get_supported_tasks_for_model_type("bert", "precast")
    config = TasksManager.get_exporter_config_constructor("precast", model_type="bert", task="fill-mask")(bert_config)
    config.mandatory_axes  # ("batch_size", "sequence_length")

What is registered is the table of support: each pair of a model type and a task that passed.
"""

from __future__ import annotations

from typing import Any

from optimum.exporters.tasks import TasksManager

from precast.exporter.support import supported_tasks, table

__all__ = ["PrecastExportConfig"]


class PrecastExportConfig:
    """How a model is exported for a task.

    Attributes:
        config: the checkpoint's configuration.
        task: the task's name.
        mandatory_axes: the sizes that `precast export` must be given for it, as it names them.
    """

    def __init__(self, config: Any, task: str = "feature-extraction", **_: Any) -> None:
        self.config, self.task = config, task

    @property
    def mandatory_axes(self) -> tuple[str, ...]:
        return supported_tasks(self.config.model_type)[self.task].axes


def _register() -> None:
    register = TasksManager.create_register("precast")
    known = set(TasksManager.get_all_tasks())
    for line in table():
        if line.passes and line.task in known:
            register(line.model_type, line.task)(PrecastExportConfig)


_register()
