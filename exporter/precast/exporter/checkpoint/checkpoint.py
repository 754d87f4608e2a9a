"""A checkpoint on this machine: its configuration, its tokenizer, its task, and the model with or without weights."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig

from precast.runtime.artifact import strict_json
from precast.runtime.artifact.integrity import sha256_of
from precast.runtime.artifact.published_json import parse_object
from precast.runtime.artifact.tasks import TASK_TABLE, TASKS, Task, find_tasks, get_task
from precast.runtime.errors import CheckpointError, FormatError

from ..adapters.adapter import Adapter
from ..adapters.merge import merge_adapter
from ..support import choose_task, infer_task, supported_tasks
from .describe import describe_error
from .files import weight_files
from .gguf import SharedReader
from .language_model import MULTIMODAL_CLASSES, keep_language_model, multimodal_class
from .loaded_model import attend_fully, attention_implementation, check_complete, check_finite
from .peft_adapters import check_merged
from .prequantized import (
    Packing,
    SourceScheme,
    check_all_used,
    find_packing,
    find_quantization_settings,
    strip_quantization,
    unpack_tensors,
)
from .sentence_texts import sentence_files
from .sentence_transformers import attach_sentences, embeds_sentences, sentence_weights

__all__ = ["Checkpoint"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files on this machine.

    Attributes:
        given: what the user typed.
        name: Hub id or local base name, as recorded in the artifact.
        directory: where the files lie.
        gguf_file: file name within `directory` for a GGUF checkpoint.
        revision: commit of a Hub checkpoint.
        embeds_sentences: whether a sentence-transformers model answers with the vectors of texts, too.
        weights: the file or folder of its weights, where they do not lie in `directory`.
        adapters: what is merged into its weights, in this order.
    """

    given: str
    name: str
    directory: Path
    gguf_file: str | None
    revision: str | None
    trust_remote_code: bool
    embeds_sentences: bool = True
    weights: Path | None = None
    adapters: tuple[Adapter, ...] = ()

    @cached_property
    def config(self) -> PretrainedConfig:
        """The checkpoint's configuration. Raises CheckpointError."""
        try:
            if not self.gguf_file:
                # A config.json that an artifact could not hold is refused now rather than after the long work.
                strict_json.loads(strict_json.dumps(self._config_file), f"{self.name}/config.json")
            self._check_trust()
            with self._shared_reader:
                config = AutoConfig.from_pretrained(self.directory, trust_remote_code=self._trusts, **self._gguf)
        except CheckpointError:
            raise
        except Exception as error:
            # The libraries raise anything at a broken file.
            raise CheckpointError(
                f"The configuration of {self.name} cannot be used: {describe_error(error)}"
            ) from error
        if self.packing:
            # Its weights will be floats; with this key transformers would look for the library that packed them.
            for part in (config, config.get_text_config()):
                vars(part).pop("quantization_config", None)
        return config

    def _check_trust(self) -> None:
        """Raise CheckpointError, without running any of it, for code of the checkpoint's own that was not asked for."""
        if self.gguf_file or self.trust_remote_code:
            return
        code = self._config_file.get("auto_map", {}).get("AutoConfig")
        if code and self._config_file.get("model_type") not in transformers.CONFIG_MAPPING:
            raise CheckpointError(
                f"{self.name} brings code of its own ({code}) and is of no type that transformers has. Read that code; "
                f"then trust_remote_code=True runs it."
            )

    @cached_property
    def written_config(self) -> dict[str, Any]:
        """config.json as written, without what transformers adds, and without how weights were packed."""
        return strip_quantization(self._config_file)

    @cached_property
    def _config_file(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "config.json").read_text("utf-8"))
        return found

    @cached_property
    def packing(self) -> Packing | None:
        """How its weights are packed, where it is quantized. Raises CheckpointError for an unsupported packing."""
        settings = None if self.gguf_file else find_quantization_settings(self._config_file)
        return find_packing(settings, self.name) if settings else None

    @property
    def is_quantized(self) -> bool:
        """Whether its config.json says that its weights are quantized, in a way that is supported or not."""
        return not self.gguf_file and find_quantization_settings(self._config_file) is not None

    @property
    def source_scheme(self) -> SourceScheme | None:
        """How its packed weights are quantized; None where they are not, and for GGUF files."""
        return self.packing.scheme if self.packing else None

    @property
    def text_config(self) -> Any:
        """The part of the configuration for text; the decoder's, where there are several."""
        try:
            return self.config.get_text_config()
        except ValueError:
            return self.config.get_text_config(decoder=True)

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary; 1 for models of anything but text."""
        found = getattr(self.text_config, "vocab_size", None)
        return found if isinstance(found, int) else 1

    @property
    def vision_config(self) -> Any:
        """The part of the configuration for images."""
        return getattr(self.config, "vision_config", self.config)

    @cached_property
    def processor_files(self) -> dict[str, dict[str, Any]]:
        """The settings of its image and sound processors, by file name. Raises CheckpointError."""
        paths = [self.directory / name for name in ("preprocessor_config.json", "processor_config.json")]
        try:
            # Untrusted files: parsed as the runtime parses them.
            return {
                path.name: parse_object(path.read_bytes(), f"{self.name}/{path.name}")
                for path in paths
                if not self.gguf_file and path.is_file()
            }
        except FormatError as error:
            raise CheckpointError(str(error)) from error

    @property
    def image_settings(self) -> dict[str, Any]:
        """How its images are prepared; newer releases of transformers write that as a part of processor_config.json."""
        part = self.processor_files.get("processor_config.json", {}).get("image_processor")
        return part if isinstance(part, dict) else self.processor_files.get("preprocessor_config.json", {})

    @cached_property
    def tokenizer(self) -> Any | None:
        """The checkpoint's tokenizer, or None where it carries none."""
        if not self.has_tokenizer:
            return None
        try:
            with self._shared_reader, warnings.catch_warnings():
                # Marian's warning is about a normalization that it never does.
                warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
                found: Any = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self._trusts, **self._gguf)
            if (path := self.directory / "chat_template.json").is_file() and not found.chat_template:
                # The place where processors of images and texts kept it.
                found.chat_template = strict_json.loads(path.read_bytes(), f"{self.name}/{path.name}")["chat_template"]
            return found
        except Exception as error:
            raise CheckpointError(f"The tokenizer of {self.name} cannot be used: {describe_error(error)}") from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether it has the files of a tokenizer."""
        return self.gguf_file is not None or any((self.directory / name).exists() for name in _TOKENIZER_FILES)

    @property
    def pad_token_id(self) -> int:
        """The id that fills padding; 0 where the checkpoint names no token (padding never reaches an answer)."""
        pad = getattr(self.text_config, "pad_token_id", None)
        count = getattr(self.text_config, "vocab_size", None)
        if not isinstance(pad, int) or pad < 0 or (isinstance(count, int) and pad >= count):
            return 0
        return pad

    @property
    def max_length(self) -> int | None:
        """The longest sequence the model was made for, if its configuration says."""
        found = getattr(self.text_config, "max_position_embeddings", None)
        # RoBERTa's table holds the padding id's position and those before it too.
        offset = self.pad_token_id + 1 if self.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        return found - offset if isinstance(found, int) and found > 0 else None

    def sentence_files(self) -> dict[str, dict[str, Any]]:
        """The settings by which sentence-transformers prepares texts, by file name. Raises CheckpointError."""
        limits = [self.max_length, getattr(self.tokenizer, "model_max_length", None)]
        # Tokenizers that know no limit say 10**30.
        known = [limit for limit in limits if limit is not None and 0 < limit < 2**31]
        return sentence_files(self.directory, self.name, min(known, default=None))

    def task(self, name: str | None = None) -> Task:
        """The task of this name, done in the way that the checkpoint's type does it; by default the inferred one.

        Raises UsageError for an unknown name, CheckpointError where the checkpoint does not say what it is for.
        """
        if name is None:
            return self._infer_task()
        rows = find_tasks(name) or [get_task(name)]
        able = [row for row in rows if self._class_names(row)]
        named = (row for row in able if set(self._class_names(row)) & set(self.config.architectures or []))
        return next(named, (able or rows)[0])

    def _infer_task(self) -> Task:
        """The task of the class that the checkpoint names. Raises CheckpointError, which lists the tasks."""
        if self.gguf_file:
            return get_task("text-generation")
        names = self.config.architectures or []
        for name in names:
            # A model that reads images or sound too is exported as a model of text by request only.
            own = [task for task in TASK_TABLE if self._auto_class(task).__name__ not in MULTIMODAL_CLASSES]
            if rows := [task for task in own if name in self._class_names(task)]:
                return choose_task(rows, self._config_file)
        guessed = infer_task(self._config_file)
        if guessed in self._possible_tasks():
            # Class names that transformers gave up or never had, such as LLaMAForCausalLM.
            return self.task(guessed)
        named = f"names {', '.join(names)}, which is for none of them" if names else "names no architecture"
        raise CheckpointError(
            f"The task of {self.name} cannot be inferred: its config.json {named}. Give task=, one of: "
            f"{', '.join(self._possible_tasks()) or ', '.join(TASKS)}."
        )

    def skeleton(self, task: Task) -> nn.Module:
        """The model without weights, on the meta device, in float32 as it will be traced, since states have the model's
        dtype. Raises CheckpointError for an unsupported model type."""
        auto = self._auto_class(task)
        if not self._class_names(task):
            possible = self._possible_tasks()
            choices = f"It can be exported for: {', '.join(possible)}." if possible else "It has no supported task."
            raise CheckpointError(
                f"Models of type {self.config.model_type!r} ({self.name}) cannot do {task.name}. {choices}"
            )
        model: nn.Module
        try:
            with torch.device("meta"):
                model = auto.from_config(self.config, dtype=torch.float32, trust_remote_code=self._trusts)
        except Exception as error:
            # Each model type has code of its own, which may raise anything.
            raise CheckpointError(
                f"transformers cannot make a model for {task.name} of the configuration of {self.name}: "
                f"{describe_error(error)}"
            ) from error
        if auto.__name__ in MULTIMODAL_CLASSES:
            keep_language_model(model)
        self._attach_sentences(model, task)
        attend_fully(model)
        # Some layers construct tensors that ignore the device.
        return model.to("meta").eval()

    def load(self, task: Task, dtype: str) -> nn.Module:
        """Load the model with its weights, for inference, with attention that can be traced, and merge its adapters.

        Raises CheckpointError, UsageError where adapters are asked for and peft is not installed.
        """
        settings = {
            "config": self.config,
            "dtype": getattr(torch, dtype),
            "attn_implementation": attention_implementation(self.config),
            "output_loading_info": True,
        }
        model: nn.Module
        # Before anything is read: config.json may name files outside of the checkpoint.
        self._weight_files()
        generation = None if task.kind == "encoder" or self.gguf_file else self._generation_config()
        try:
            if self.packing:
                model, info = self._load_unpacked(self.packing, task, {**settings, "generation_config": generation})
            elif self.weights is not None:
                model, info = self._load_apart(task, {**settings, "generation_config": generation})
            else:
                with self._shared_reader:
                    auto = self._auto_class(task)
                    model, info = auto.from_pretrained(
                        self.directory, trust_remote_code=self._trusts, **settings, **self._gguf
                    )
                # A parsed GGUF file is large, and weights are the last that is read from it.
                vars(self).pop("_shared_reader")
        except CheckpointError:
            raise
        except Exception as error:
            reason = (
                "their shapes are not those of config.json" if "mismatched" in str(error) else describe_error(error)
            )
            raise CheckpointError(f"The weights of {self.name} cannot be loaded: {reason}") from error
        check_merged(info["unexpected_keys"], self.name)
        replaced = {name for adapter in self.adapters for name in merge_adapter(model, adapter)}
        missing = set(info["missing_keys"]) - replaced
        check_complete(model, missing, self.name, task.name, self.config.architectures or [])
        if self._auto_class(task).__name__ in MULTIMODAL_CLASSES:
            keep_language_model(model)
        check_finite(model, self.name)
        self._attach_sentences(model, task)
        attend_fully(model)
        return model.eval().requires_grad_(False)

    def _load_unpacked(self, packing: Packing, task: Task, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Load the model from unpacked tensors: from_pretrained takes tensors only where it is given no directory."""
        tensors = unpack_tensors(self._weight_files(), packing)
        cls: Any = type(self.skeleton(task))
        model, info = cls.from_pretrained(None, trust_remote_code=self._trusts, state_dict=tensors, **settings)
        check_all_used(model, tensors, info["unexpected_keys"], self.name)
        return model, info

    def _load_apart(self, task: Task, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Load the model from weights that do not lie with its configuration, whatever a single file is called."""
        files, config = self._weight_files(), copy.deepcopy(self.config)
        settings |= {"config": config}
        if len(files) == 1 and files[0].suffix == ".bin":
            tensors = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
            cls: Any = type(self.skeleton(task))
            model, info = cls.from_pretrained(None, trust_remote_code=self._trusts, state_dict=tensors, **settings)
            return model, info
        config.transformers_weights = files[0].name if len(files) == 1 else None
        auto = self._auto_class(task)
        model, info = auto.from_pretrained(files[0].parent, trust_remote_code=self._trusts, **settings)
        return model, info

    def _generation_config(self) -> GenerationConfig:
        """The generation settings as from_pretrained finds them: in generation_config.json, else in config.json.

        Raises CheckpointError for settings that transformers refuses, such as two that exclude each other.
        """
        try:
            try:
                return GenerationConfig.from_pretrained(self.directory)
            except OSError:
                # There is no such file, or it is no JSON.
                source = {"config_file_name": "config.json", "_from_model_config": True}
                return GenerationConfig.from_pretrained(self.directory, **source)
        except Exception as error:
            # The library raises anything at a broken file.
            raise CheckpointError(
                f"The generation settings of {self.name} cannot be used: {describe_error(error)} Correct its "
                f"generation_config.json."
            ) from error

    def weights_sha256(self) -> str:
        """One hash over all weight files: the file's own, or for several that of the list of names and hashes."""
        files = self._weight_files()
        if not self.gguf_file:
            files += sentence_weights(self.directory, self.name)
        hashes = [(self._name_of(path), sha256_of(path)) for path in files]
        if len(hashes) == 1:
            return hashes[0][1]
        return hashlib.sha256("".join(f"{name} {value}\n" for name, value in hashes).encode()).hexdigest()

    @cached_property
    def _shared_reader(self) -> AbstractContextManager[None]:
        return SharedReader() if self.gguf_file else nullcontext()

    @property
    def _trusts(self) -> bool:
        # With None transformers would ask on the terminal, and run the code after a "y".
        return bool(self.trust_remote_code)

    @property
    def _gguf(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def _weight_files(self) -> list[Path]:
        if self.gguf_file:
            return [self.directory / self.gguf_file]
        if self.weights is None:
            return weight_files(self.directory, self.name, self._config_file)
        return [self.weights] if self.weights.is_file() else weight_files(self.weights, self.weights.name, {})

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix() if path.is_relative_to(self.directory) else path.name

    def _auto_class(self, task: Task) -> Any:
        """transformers' auto class for `task`: for features of T5's relatives that of their encoder alone; for text
        generation by a type without a class for text alone, that of models of images or sound and text."""
        auto = getattr(transformers, task.auto)
        encoder = transformers.AutoModelForTextEncoding._model_mapping.get(type(self.config), None)
        if task.auto == "AutoModel" and encoder is not None and encoder.__name__.endswith("EncoderModel"):
            return transformers.AutoModelForTextEncoding
        if task.kind != "decoder" or self._has_own_code(auto) or type(self.config) in auto._model_mapping:
            return auto
        return multimodal_class(self.config) or auto

    def _class_names(self, task: Task) -> list[str]:
        """The model classes that do `task` for this checkpoint's type; none where it cannot."""
        auto = self._auto_class(task)
        if self._has_own_code(auto):
            return [self.config.auto_map[auto.__name__].rpartition(".")[2]]
        mapping = auto._model_mapping
        if type(self.config) not in mapping:
            return []
        found = mapping[type(self.config)]
        return [cls.__name__ for cls in (found if isinstance(found, tuple) else (found,))]

    def _has_own_code(self, auto: Any) -> bool:
        return self.trust_remote_code and auto.__name__ in getattr(self.config, "auto_map", {})

    def _possible_tasks(self) -> list[str]:
        """The tasks that transformers has a class for, without those known to be refused."""
        known = supported_tasks(self.config.model_type)
        names = dict.fromkeys(task.name for task in TASK_TABLE if self._class_names(task))
        return [name for name in names if name not in known or known[name].passes]

    def _attach_sentences(self, model: nn.Module, task: Task) -> None:
        """Let the model of a sentence-transformers checkpoint answer with the vectors of texts, too."""
        if self.embeds_sentences and task.name == "feature-extraction" and not self.gguf_file:
            attach_sentences(model, self.directory, self.name)
            if embeds_sentences(model):
                # Unsupported settings are refused now rather than after the long work.
                self.sentence_files()
