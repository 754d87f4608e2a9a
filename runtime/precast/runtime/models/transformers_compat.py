"""The attributes of a transformers model, for `transformers.pipeline(task, model=compiled, tokenizer=…)`.

torch and transformers are looked up only where the caller has imported them already.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..artifact import Artifact
    from ..artifact.schema import Variant

__all__ = ["Config", "ForTransformers"]


class Config(dict[str, Any]):
    """A checkpoint's configuration: a dict, with the attributes of transformers' configuration where that is imported.

    So `config["id2label"]["0"]` is what config.json says, and `config.id2label[0]` what transformers makes of it,
    defaults included.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "transformers" not in sys.modules:
            raise AttributeError(
                f"config.{name}: while transformers is not imported, the configuration is a dict; say config[{name!r}]."
            )
        return getattr(self._transformers_config, name)

    @cached_property
    def _transformers_config(self) -> Any:
        transformers = sys.modules["transformers"]
        kind, known = self.get("model_type"), transformers.CONFIG_MAPPING
        # The mapping imports its classes on demand, so `in` and [] know more than `get`.
        found = known[kind] if kind in known else transformers.PreTrainedConfig  # noqa: SIM401
        return found.from_dict(dict(self))


class ForTransformers:
    """The attributes of a transformers model that its pipelines read."""

    config: Config
    artifact: Artifact
    variant: Variant
    base_model_prefix = "model"
    input_modalities = ("text",)
    output_modalities = ("text",)

    @property
    def device(self) -> Any:
        """Where the model takes its inputs from and leaves its answers, whatever runs its graphs: the CPU's memory, as
        a torch.device where torch is imported, else "cpu"."""
        # Every pipeline reads the device before it checks the model's class, and reads nothing else before that.
        _register_class_names()
        torch = sys.modules.get("torch")
        return "cpu" if torch is None else torch.device("cpu")

    @property
    def dtype(self) -> Any:
        """The dtype of its floating-point inputs and answers: a torch.dtype where torch is imported, else its name."""
        torch = sys.modules.get("torch")
        return "float32" if torch is None else torch.float32

    @property
    def main_input_name(self) -> str:
        """The name of the first input: "input_ids", "pixel_values", "input_values" or "input_features"."""
        return str(self.variant.graphs[0].inputs[0].name)

    @property
    def name_or_path(self) -> str:
        """The artifact's directory."""
        return str(self.artifact.path)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself: it runs where it was compiled for, and takes tensors from any device."""
        return self

    def eval(self) -> Any:
        """The model itself: there is no other mode."""
        return self

    def can_generate(self) -> bool:
        """Whether it has `generate`."""
        return hasattr(self, "generate")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the model."""
        return self(*args, **kwargs)  # type: ignore[operator]


# transformers' tables of model classes -> our class that belongs there.
_CLASS_LISTS = {
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "CompiledModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "CompiledModelForTokenClassification",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "CompiledModelForMaskedLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CompiledModelForCausalLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "CompiledModelForSeq2SeqLM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "CompiledModelForSpeechSeq2Seq",
    "MODEL_FOR_CTC_MAPPING_NAMES": "CompiledModelForCTC",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "CompiledModelForAudioClassification",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "CompiledModelForImageClassification",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": "CompiledModelForSemanticSegmentation",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES": "CompiledModelForObjectDetection",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES": "CompiledModelForZeroShotImageClassification",
}


def _register_class_names() -> None:
    """Add our classes to the tables of names that transformers' pipelines check a model's class against.

    `AutoModel….register` does not reach them: they are tables by model type, for which ours is "precast".
    """
    known = sys.modules.get("transformers.models.auto.modeling_auto")
    for name, ours in _CLASS_LISTS.items():
        if known is not None and hasattr(known, name):
            getattr(known, name).setdefault("precast", ours)
