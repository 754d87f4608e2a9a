"""precast in optimum's TasksManager, under the exporter's name "precast": importing this module registers it.

    import optimum.exporters.precast
    from optimum.exporters.tasks import TasksManager

    TasksManager.get_supported_tasks_for_model_type("bert", "precast")
    config = TasksManager.get_exporter_config_constructor("precast", model_type="bert", task="fill-mask")(bert_config)
    config.mandatory_axes  # ("batch_size", "sequence_length")

As in optimum-neuron's guide, the class knows them without a configuration:
`get_exporter_config_constructor("precast", model_type="bert", task=task).func.get_mandatory_axes_for_task(task)`.

What is registered is the table of support: each pair of a model type and a task that passed.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from optimum.exporters.tasks import TasksManager

from precast.exporter.support import supported_tasks, table

__all__ = ["PrecastExportConfig"]


class PrecastExportConfig:
    """How a model is exported for a task.

    Attributes:
        config: the checkpoint's configuration.
        task: the task's name.
        mandatory_axes: the sizes that `precast export` must be given for it, as it names them.
        model_type: whose sizes they are, where there is no configuration.
    """

    model_type: ClassVar[str] = ""

    def __init__(self, config: Any, task: str = "feature-extraction", **_: Any) -> None:
        self.config, self.task = config, task

    @property
    def mandatory_axes(self) -> tuple[str, ...]:
        return supported_tasks(self.config.model_type)[self.task].axes

    @classmethod
    def get_mandatory_axes_for_task(cls, task: str) -> tuple[str, ...]:
        """The sizes that an export of a model of this class's type must be given for a task."""
        return supported_tasks(cls.model_type)[task].axes


@cache
def _config_class(model_type: str) -> type[PrecastExportConfig]:
    return type("PrecastExportConfig", (PrecastExportConfig,), {"model_type": model_type})


def _register() -> None:
    register = TasksManager.create_register("precast")
    known = set(TasksManager.get_all_tasks())
    for line in table():
        if line.passes and line.task in known:
            register(line.model_type, line.task)(_config_class(line.model_type))


_register()
