"""`OfflineInference`: prompts in, texts out, by an InferenceConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UsageError
from .config import InferenceConfig
from .model_runner import Generated, ModelRunner

__all__ = ["OfflineInference", "SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one call are chosen; what is None is as the InferenceConfig says.

    Attributes:
        temperature, top_p, top_k, seed: see DataConfig.
        max_new_tokens: no more than that of the SchedulerConfig, for which the caches are made.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None


class OfflineInference:
    """A model that answers lists of prompts.

    Args:
        config: the settings; or a mapping, as InferenceConfig.from_dict takes it.
        runner: the class that runs it, ModelRunner or a subclass.
        model: an opened model, instead of what model_path names.

    Raises:
        PrecastError: a setting is wrong, or the model cannot be opened.
    """

    def __init__(self, config: Any, runner: type[ModelRunner] = ModelRunner, model: Any = None) -> None:
        self.config = config if isinstance(config, InferenceConfig) else InferenceConfig.from_dict(config)
        self.runner = runner(self.config.runner_settings())
        self.runner.init_model(model)

    def warm_up(self) -> None:
        """Run two steps, so that the first answer takes no longer than others."""
        self.runner.model_generate(["warm-up"], warm_up=True)

    def generate(self, prompts: Sequence[Any], sampling_params: SamplingParams | None = None) -> Generated:
        """Answer prompts: texts, or mappings with the key "text". Raises InputError for anything else, UsageError for
        settings out of range."""
        usual = self.runner.settings
        given = {
            name: value for name, value in asdict(sampling_params or SamplingParams()).items() if value is not None
        }
        if (most := given.get("max_new_tokens", 1)) > usual.max_new_tokens:
            raise UsageError(
                f"max_new_tokens={most} is more than the {usual.max_new_tokens} of the SchedulerConfig, for which the "
                f"caches are made. Set it there."
            )
        settings = replace(usual, **given)
        settings.check()
        self.runner.settings = settings
        try:
            return self.runner.model_generate(prompts)
        finally:
            self.runner.settings = usual
