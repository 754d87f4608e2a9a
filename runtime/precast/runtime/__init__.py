"""Load a compiled model and let it answer; numpy and onnxruntime are all it takes.

from precast.runtime import CompiledModelForCausalLM

model = CompiledModelForCausalLM.from_pretrained("out")        # a directory, or user/repo on the Hub
batch = model.tokenizer(["The capital of France is"])
ids = model.generate(batch["input_ids"], max_new_tokens=16)
print(model.tokenizer.decode(ids[0]))
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# From 1.32 on ONNX Runtime keeps a device id and a database of events in the user's cache. It looks at this variable
# once, when it is first imported, which all of precast does after this line. Who sets it to 0 has telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_EXPORTS = {
    "CompiledModel": "models.base",
    "CompiledModelForAudioClassification": "models.audio",
    "CompiledModelForAudioFrameClassification": "models.audio",
    "CompiledModelForCTC": "models.audio",
    "CompiledModelForCausalLM": "models.causal_lm",
    "CompiledModelForFeatureExtraction": "models.text",
    "CompiledModelForImageClassification": "models.vision",
    "CompiledModelForMaskedLM": "models.text",
    "CompiledModelForMultipleChoice": "models.text",
    "CompiledModelForObjectDetection": "models.vision",
    "CompiledModelForQuestionAnswering": "models.text",
    "CompiledModelForSemanticSegmentation": "models.vision",
    "CompiledModelForSeq2SeqLM": "models.seq2seq",
    "CompiledModelForSequenceClassification": "models.text",
    "CompiledModelForSpeechSeq2Seq": "models.whisper",
    "CompiledModelForTokenClassification": "models.text",
    "CompiledModelForXVector": "models.audio",
    "CompiledModelForZeroShotImageClassification": "models.vision",
    "GenerationConfig": "generation.config",
    "PrecastError": "errors",
    "TextStream": "inputs.tokenizer",
    "Tokenizer": "inputs.tokenizer",
    "pipeline": "pipelines",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("precast")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
