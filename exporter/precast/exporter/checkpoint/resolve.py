"""MODEL -> checkpoint: where its files are, its configuration, its tokenizer; weights only when asked."""

from __future__ import annotations

import hashlib
import json
import os
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
from precast.runtime.hosts.reach import hub_or_cache

from ..options import ExportOptions
from ..support import meant, supported_tasks, task_in
from .files import weight_files
from .gguf import ParsedOnce
from .language_model import READS_MORE, keep_language_model, wider_class
from .locate import check_is_checkpoint, find_local, not_given
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

__all__ = ["Checkpoint", "first_line", "resolve"]

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
_DOWNLOAD = [
    "*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.jinja", "*.py",
]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A local copy of what the user named.

    Attributes:
        given: what the user typed.
        name: Hub id or local base name, as recorded in the artifact.
        directory: where the files lie.
        gguf_file: file name within `directory` for a GGUF checkpoint.
        revision: commit of a Hub checkpoint.
    """

    given: str
    name: str
    directory: Path
    gguf_file: str | None
    revision: str | None
    trust_remote_code: bool
    embeds_sentences: bool = True
    """Whether a model of sentence-transformers answers with the vectors of its texts, too."""

    @cached_property
    def config(self) -> PretrainedConfig:
        """The checkpoint's configuration. Raises CheckpointError."""
        try:
            if not self.gguf_file:
                # What an artifact could not repeat is refused now rather than after the long work.
                strict_json.loads(strict_json.dumps(self._config_file), f"{self.name}/config.json")
            self._check_trust()
            with self._parsed_once:
                config = AutoConfig.from_pretrained(self.directory, trust_remote_code=self._trusts, **self._gguf)
        except CheckpointError:
            raise
        except Exception as error:
            # The libraries meet a broken file with errors of any type.
            raise CheckpointError(f"The configuration of {self.name} cannot be used: {first_line(error)}") from error
        if self.packing:
            # Its weights will be floats, and transformers would look for the library that packed them.
            for part in (config, config.get_text_config()):
                vars(part).pop("quantization_config", None)
        return config

    def _check_trust(self) -> None:
        """Code of a checkpoint runs only on request; nothing of it is needed to say so."""
        if self.gguf_file or self.trust_remote_code:
            return
        code = self._config_file.get("auto_map", {}).get("AutoConfig")
        if code and self._config_file.get("model_type") not in transformers.CONFIG_MAPPING:
            raise CheckpointError(
                f"{self.name} brings code of its own ({code}) and is of no type that transformers has. Read that code; "
                f"then --trust-remote-code runs it."
            )

    @cached_property
    def written_config(self) -> dict[str, Any]:
        """config.json as it stands, without what transformers adds; and without how weights were packed."""
        return strip_quantization(self._config_file)

    @cached_property
    def _config_file(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "config.json").read_text("utf-8"))
        return found

    @cached_property
    def packing(self) -> Packing | None:
        """How its weights are packed, where it is quantized. Raises CheckpointError for a way that is not supported."""
        settings = None if self.gguf_file else find_quantization_settings(self._config_file)
        return find_packing(settings, self.name) if settings else None

    @property
    def source_scheme(self) -> SourceScheme | None:
        """How its packed weights are quantized; None where they are not, and for GGUF files."""
        return self.packing.scheme if self.packing else None

    @property
    def text_config(self) -> Any:
        """The part of the configuration that says what texts are like: of several, the decoder's."""
        try:
            return self.config.get_text_config()
        except ValueError:
            return self.config.get_text_config(decoder=True)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; 1 for models of anything but text."""
        found = getattr(self.text_config, "vocab_size", None)
        return found if isinstance(found, int) else 1

    @property
    def vision_config(self) -> Any:
        """The part of the configuration that says what images are like."""
        return getattr(self.config, "vision_config", self.config)

    @cached_property
    def processor_files(self) -> dict[str, dict[str, Any]]:
        """What it says of images and sounds, by the names of the files that say it. Raises CheckpointError."""
        paths = [self.directory / name for name in ("preprocessor_config.json", "processor_config.json")]
        try:
            # Other people wrote them: read as the runtime reads them, and as transformers does.
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
            with self._parsed_once, warnings.catch_warnings():
                # Marian's, of a normalization that it does not do in any case.
                warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
                found: Any = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self._trusts, **self._gguf)
            if (path := self.directory / "chat_template.json").is_file() and not found.chat_template:
                # Where processors of images and texts had it.
                found.chat_template = strict_json.loads(path.read_bytes(), f"{self.name}/{path.name}")["chat_template"]
            return found
        except Exception as error:
            raise CheckpointError(f"The tokenizer of {self.name} cannot be used: {first_line(error)}") from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether it carries files of a tokenizer."""
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
        """What sentence-transformers does to texts, in its own files. Raises CheckpointError."""
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
            # What reads images or sound too becomes a model of text by request only.
            own = [task for task in TASK_TABLE if self._auto_class(task).__name__ not in READS_MORE]
            if rows := [task for task in own if name in self._class_names(task)]:
                return meant(rows, self._config_file)
        guessed = task_in(self._config_file)
        if guessed in self._possible_tasks():
            # A name that transformers gave up, or never had: LLaMAForCausalLM.
            return self.task(guessed)
        named = f"names {', '.join(names)}, which is for none of them" if names else "names no architecture"
        raise CheckpointError(
            f"The task of {self.name} cannot be inferred: its config.json {named}. Give --task, one of: "
            f"{', '.join(self._possible_tasks()) or ', '.join(TASKS)}."
        )

    def skeleton(self, task: Task) -> nn.Module:
        """The model without weights, on the meta device, in float32 as it is traced whatever it was published in: what
        it carries beside keys and values has its dtype. Raises CheckpointError for an unsupported model type."""
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
            # Any type: each model type has code of its own.
            raise CheckpointError(
                f"transformers cannot make a model for {task.name} of the configuration of {self.name}: "
                f"{first_line(error)}"
            ) from error
        if auto.__name__ in READS_MORE:
            keep_language_model(model)
        self._attach_sentences(model, task)
        _attend_fully(model)
        # Some layers make tensors by constructors that heed no device.
        return model.to("meta").eval()

    def load(self, task: Task, dtype: str) -> nn.Module:
        """The model with its weights, for inference, with attention that can be traced. Raises CheckpointError."""
        settings = {
            "config": self.config,
            "dtype": getattr(torch, dtype),
            "attn_implementation": _implementation(self.config),
            "output_loading_info": True,
        }
        model: nn.Module
        # Before anything is read: they may be others' than the checkpoint's.
        self._weight_files()
        generation = None if task.kind == "encoder" or self.gguf_file else self._generation_config()
        try:
            if self.packing:
                model, info = self._load_unpacked(self.packing, task, {**settings, "generation_config": generation})
            else:
                with self._parsed_once:
                    auto = self._auto_class(task)
                    model, info = auto.from_pretrained(
                        self.directory, trust_remote_code=self._trusts, **settings, **self._gguf
                    )
                # A parsed vocabulary is large, and weights are the last to be read.
                vars(self).pop("_parsed_once")
        except CheckpointError:
            raise
        except Exception as error:
            reason = "their shapes are not those of config.json" if "mismatched" in str(error) else first_line(error)
            raise CheckpointError(f"The weights of {self.name} cannot be loaded: {reason}") from error
        check_merged(info["unexpected_keys"], self.name)
        self._check_complete(model, info, task)
        if self._auto_class(task).__name__ in READS_MORE:
            keep_language_model(model)
        self._check_numbers(model)
        self._attach_sentences(model, task)
        _attend_fully(model)
        return model.eval().requires_grad_(False)

    def _load_unpacked(self, packing: Packing, task: Task, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As from_pretrained loads it, which takes tensors only from those who name no directory."""
        tensors = unpack_tensors(self._weight_files(), packing)
        cls: Any = type(self.skeleton(task))
        model, info = cls.from_pretrained(None, trust_remote_code=self._trusts, state_dict=tensors, **settings)
        check_all_used(model, tensors, info["unexpected_keys"], self.name)
        return model, info

    def _generation_config(self) -> GenerationConfig:
        """How it generates, as from_pretrained finds it: what generation_config.json says, else what config.json does.

        Raises CheckpointError for settings that transformers refuses, such as two that exclude each other.
        """
        try:
            try:
                return GenerationConfig.from_pretrained(self.directory)
            except OSError:
                # There is none, or it is no JSON.
                source = {"config_file_name": "config.json", "_from_model_config": True}
                return GenerationConfig.from_pretrained(self.directory, **source)
        except Exception as error:
            # The library meets a broken file with errors of any type.
            raise CheckpointError(
                f"The generation settings of {self.name} cannot be used: {first_line(error)} Correct its "
                f"generation_config.json."
            ) from error

    def weights_sha256(self) -> str:
        """One hash over all weight files: the file's own, or of the list of names and hashes for several."""
        files = self._weight_files()
        if not self.gguf_file:
            files += sentence_weights(self.directory, self.name)
        hashes = [(path.relative_to(self.directory).as_posix(), sha256_of(path)) for path in files]
        if len(hashes) == 1:
            return hashes[0][1]
        return hashlib.sha256("".join(f"{name} {value}\n" for name, value in hashes).encode()).hexdigest()

    @cached_property
    def _parsed_once(self) -> AbstractContextManager[None]:
        return ParsedOnce() if self.gguf_file else nullcontext()

    @property
    def _trusts(self) -> bool:
        # None would ask on the terminal, and run the code after a "y".
        return bool(self.trust_remote_code)

    @property
    def _gguf(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def _weight_files(self) -> list[Path]:
        if self.gguf_file:
            return [self.directory / self.gguf_file]
        return weight_files(self.directory, self.name, self._config_file)

    def _auto_class(self, task: Task) -> Any:
        """The class that loads a model for `task`; for text that of a type which reads images or sound too, where the
        type has none for text alone; for features T5's encoder alone, which needs no answer to be read to."""
        auto = getattr(transformers, task.auto)
        encoder = transformers.AutoModelForTextEncoding._model_mapping.get(type(self.config), None)
        if task.auto == "AutoModel" and encoder is not None and encoder.__name__.endswith("EncoderModel"):
            return transformers.AutoModelForTextEncoding
        if task.kind != "decoder" or self._has_own_code(auto) or type(self.config) in auto._model_mapping:
            return auto
        return wider_class(self.config) or auto

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
        """What transformers has a class for, without what is known to be refused."""
        known = supported_tasks(self.config.model_type)
        names = dict.fromkeys(task.name for task in TASK_TABLE if self._class_names(task))
        return [name for name in names if name not in known or known[name].passes]

    def _attach_sentences(self, model: nn.Module, task: Task) -> None:
        """A sentence-transformers checkpoint's vectors are those of its texts."""
        if self.embeds_sentences and task.name == "feature-extraction" and not self.gguf_file:
            attach_sentences(model, self.directory, self.name)
            if embeds_sentences(model):
                # What cannot be done is refused now rather than after the long work.
                self.sentence_files()

    def _check_complete(self, model: nn.Module, info: dict[str, Any], task: Task) -> None:
        """Weights that the checkpoint lacks would be random. A pooler is not part of any answer."""
        missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
        if missing:
            raise CheckpointError(
                f"{self.name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} of "
                f"{type(model).__name__}, so its answers for {task.name} would be random. Choose the task that it was "
                f"trained for; its config.json names {', '.join(self.config.architectures or ['no architecture'])}."
            )

    def _check_numbers(self, model: nn.Module) -> None:
        """No comparison need meet a row of an embedding table that holds NaN; the user's texts will."""
        for name, weight in model.named_parameters():
            # A sum of finite numbers is none, and reads them only once.
            if weight.is_floating_point() and weight.sum().isnan() and (wrong := weight.isnan()).any():
                first = wrong.nonzero()[0].tolist()
                raise CheckpointError(
                    f"The weights of {self.name} hold NaN: {int(wrong.sum()):,} of {weight.numel():,} numbers of "
                    f"{name}, the first at {first}. The checkpoint is damaged; fetch it again, or save it from sound "
                    f"weights."
                )


def _implementation(config: Any) -> str:
    """The attention of the reference, and of what is compiled in ordinary operators: eager, which every type has. That
    of Falcon with ALiBi adds the bias twice; what transformers does unless it is asked otherwise adds it once."""
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def _attend_fully(model: nn.Module) -> None:
    """Full attention for BigBird, as transformers has it for rows that blocks do not fit; others are not compiled for
    (`check_blocks`)."""
    if getattr(model.config, "attention_type", None) == "block_sparse":
        # The outermost that can be told tells those within; BigBirdPegasus's decoder alone has no blocks.
        chosen: Any = next((module for module in model.modules() if hasattr(module, "set_attention_type")), None)
        if chosen is not None and chosen.attention_type == "block_sparse":
            chosen.set_attention_type("original_full")


def resolve(model: str, options: ExportOptions) -> Checkpoint:
    """Find the checkpoint that `model` names: a local directory, a `.gguf` file, or a Hub id.

    Raises CheckpointError where there is none, UsageError for a revision of what is no Hub id.
    """
    if found := find_local(model, options.revision):
        return Checkpoint(model, found.name, found.directory, found.gguf_file, None, options.trust_remote_code)
    return _from_hub(model, options)


def _from_hub(model: str, options: ExportOptions) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with hub_or_cache() as problem:
        try:
            path = snapshot_download(
                model, revision=options.revision, token=options.token, allow_patterns=_DOWNLOAD,
                ignore_patterns=["original/*", "onnx/*", "openvino/*"], local_files_only=problem is not None,
            )  # fmt: skip
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise not_given(model, problem or first_line(error)) from error
    check_is_checkpoint(Path(path), model)
    # The snapshot's own directory is named after the commit.
    commit = os.path.basename(os.path.normpath(path))
    return Checkpoint(model, model, Path(path).resolve(), None, commit, options.trust_remote_code)


def first_line(error: BaseException) -> str:
    """What the error says, with its type where that is needed to understand it."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, KeyError):
        return f"{type(error).__name__} {str(error).strip()}".strip()
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))
