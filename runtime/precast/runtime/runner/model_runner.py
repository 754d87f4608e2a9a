"""`ModelRunner`: load a model and generate by steps, each of which can be overridden."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError, UsageError
from ..generation.config import GenerationConfig
from ..generation.prompt import Prompt
from ..generation.sampling import Processors, Sampler, check_logits
from ..inputs.tokenizer import Tokenizer
from ..terminal import quoted
from .execution import log
from .modes import is_checkpoint, open_model
from .settings import RunnerSettings
from .step_trace import NoProfiler, trace_steps
from .timing import Timing

__all__ = ["Generated", "ModelRunner"]

Array = np.ndarray[Any, Any]

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Generated:
    """What `ModelRunner.model_generate` answers.

    Attributes:
        texts: one for each prompt, without the prompt.
        tokens: the same as token ids, up to and with the end.
        timing: seconds of each step.
    """

    texts: list[str]
    tokens: list[list[int]]
    timing: Timing


class ModelRunner:
    """Runs a decoder step by step, through hooks that a subclass may override. docs/runner.md has the table of hooks.

        runner = ModelRunner({"model_path": "out", "data_config": {"input_max_len": 64}})
        runner.init_model()
        print(runner.model_generate(["Water boils at"]).texts)

    Args:
        settings: see RunnerSettings; a mapping, as its YAML file holds it.

    Attributes:
        settings: the same, checked.
        device: where the model runs, set by `init_device`.
        model: the opened model, set by `init_model`; its interface is that of `open_model`.
        model_cfg: the configuration of the model, as a mapping, after `update_model_cfg`.
        tokenizer, padding_side, truncation_side: set by `init_tokenizer`.
        timing: of the last `model_generate`.
    """

    HOOKS: ClassVar[tuple[str, ...]] = (
        "init_device", "init_model", "check_model_cfg", "update_model_cfg", "to_device", "scale_dtype_adapter",
        "cast_format", "compile_model", "graph_compile", "init_tokenizer", "tokenize_prompts", "model_input_prepare",
        "model_inference", "model_output_process", "get_jump_flag", "mark_inputs", "model_generate", "save_model",
        "define_profiler",
    )  # fmt: skip
    """The methods that are called by each other, in the order in which that begins."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Raise UsageError where a class overrides a hook by what cannot be called as it is called."""
        super().__init_subclass__(**keywords)
        for name in cls.HOOKS:
            if name in vars(cls):
                _check_override(cls, name, vars(cls)[name])

    def __init__(self, settings: Any) -> None:
        self.settings = RunnerSettings.of(settings)
        self.model: Any = None
        self.model_cfg: dict[str, Any] = {}
        self.tokenizer: Tokenizer | None = None
        self.timing = Timing()
        self._session: Any = None
        self._is_online, self._skipped = True, 0
        self.init_device()

    # ------------------------------------------------------------ loading

    def init_device(self) -> None:
        """Set `device`: where the weights will be."""
        self.device = self.settings.device

    def init_model(self, model: Any = None, config: Mapping[str, Any] | None = None) -> None:
        """Load the model, and prepare everything for `model_generate`.

        Args:
            model: an opened model to use instead of what `model_path` names: of `open_model`, or of a class of your
                own with `session()`, `tokenizer`, `config`, `capacity` and `batch_size`.
            config: what `update_model_cfg` adds to the configuration.
        """
        started = time.perf_counter()
        self.model = model
        self._is_online = self._loads_online()
        if self._is_online:
            self._init_model_with_online_splited_weight(config or {})
        else:
            self._init_model_with_offline_splited_weight(config or {})
        log.info("Loading weights took %.2f s", time.perf_counter() - started)
        self._process_weight_after_loading()
        self.compile_model()
        self.init_tokenizer()

    def check_model_cfg(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError where settings ask for what a model with this config.json cannot do."""
        longest, asked = config.get("max_position_embeddings"), self.settings.capacity
        if isinstance(longest, int) and 0 < longest < asked:
            raise UsageError(
                f"input_max_len={self.settings.input_max_len} and max_new_tokens={self.settings.max_new_tokens} need "
                f"{asked} positions, and {self.settings.model_name} was made for {longest}: its "
                f"max_position_embeddings. Make one of them smaller."
            )

    def update_model_cfg(self, config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration that hooks read as `model_cfg`: config.json's with the changes that init_model() was
        given. What is computed stays what the weights were made for."""
        return {**config, **changes}

    def to_device(self) -> None:
        """Move the weights to `device`."""
        self.model = self.model.to(self.device)

    def scale_dtype_adapter(self) -> None:
        """Change the dtype of the scales of quantized weights. An artifact's have had theirs since the export."""

    def cast_format(self) -> None:
        """Change the layout of weights for the kernels. An artifact's are packed when it is opened."""

    def compile_model(self) -> None:
        """Compile, where the mode has a graph."""
        if self.settings.mode.has_graph:
            self.graph_compile()

    def graph_compile(self) -> None:
        """Open, or compile, the graphs by running each once."""
        log.info("Opening the graphs of %s took %.2f s", self.settings.model_name, self.model.warm_up())

    def init_tokenizer(self) -> None:
        """Set `tokenizer`, and the sides on which prompts are padded and cut: the right."""
        self.tokenizer = self.model.tokenizer
        self.padding_side = self.truncation_side = "right"

    def save_model(self, path: str | Path) -> None:
        """Write the model: an artifact, or a checkpoint as transformers writes it."""
        self._opened.save_pretrained(path)

    # ------------------------------------------------------------ generating

    def model_generate(self, prompts: Sequence[Any], warm_up: bool = False) -> Generated:
        """Answer prompts, `batch_size` at a time: prefill once, then one step per token.

        Args:
            prompts: texts, or mappings with the key "text".
            warm_up: run two steps and no more, without a profiler.
        """
        _ = self._opened
        self.timing = Timing()
        texts, tokens = [_text_of(prompt) for prompt in prompts], []
        if not texts:
            raise InputError("There is no prompt; give at least one.")
        size = self.settings.batch_size
        with self._log_file(), self._profiler(warm_up) as profiler:
            for start in range(0, len(texts), size):
                tokens += self._generate_batch(texts[start : start + size], start, warm_up, profiler)
            self._warn_without_trace(warm_up)
            answers = [self._tokenizer.decode(row) for row in tokens]
            self._log_answers(answers)
        return Generated(answers, tokens, self.timing)

    def tokenize_prompts(self, prompts: Sequence[str]) -> dict[str, Array]:
        """Token ids and their mask, int64 [rows, input_max_len]: what is longer is cut, what is shorter is padded."""
        width = self.settings.input_max_len
        pad = next((each for each in map(self._tokenizer.token_id, ("pad", "eos")) if each is not None), 0)
        ids, mask = np.full((len(prompts), width), pad, np.int64), np.zeros((len(prompts), width), np.int64)
        for index, prompt in enumerate(prompts):
            row = self._tokenizer.encode(prompt)
            if not row:
                raise InputError(f"Prompt {index + 1} of the batch has no token. Give at least one character.")
            if len(row) > width:
                log.warning("A prompt of %d tokens was cut to input_max_len=%d.", len(row), width)
            row = row[:width] if self.truncation_side == "right" else row[-width:]
            place = slice(0, len(row)) if self.padding_side == "right" else slice(width - len(row), width)
            ids[index, place], mask[index, place] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def model_input_prepare(self, input_dict: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the next step: `input_ids` [rows, length], `position_ids` alike, `kv_len` [rows], the tokens
        that the caches hold, `attention_mask` at the prefill, and `is_active` [rows], false for rows that have ended.
        Their shapes are the same at every decode step."""
        ids, held = input_dict["input_ids"], input_dict["kv_len"]
        prepared = {"input_ids": ids, "kv_len": held, "is_active": ~input_dict["is_finished"]}
        if input_dict["is_prefill"]:
            mask = input_dict["attention_mask"]
            return {**prepared, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
        return {**prepared, "position_ids": held[:, None]}

    def model_inference(
        self, model_inputs: dict[str, Any], is_prefill: bool = False, warm_up: bool = False
    ) -> tuple[Array, float]:
        """Run one step: the logits after each row's last token, [rows, vocabulary], and the seconds it took."""
        if warm_up:
            self.mark_inputs(model_inputs)
        ids, session = model_inputs["input_ids"], self._session
        started = time.perf_counter()
        if is_prefill:
            real = zip(ids, model_inputs["attention_mask"], strict=True)
            logits = session.prefill([row[mask == 1] for row, mask in real])
        else:
            pairs = zip(ids[:, 0].tolist(), model_inputs["is_active"], strict=True)
            logits = session.decode([token if is_active else None for token, is_active in pairs])
        seconds = time.perf_counter() - started
        stage = "prefill" if is_prefill else "decode"
        log.info("%s inference time cost of %s is %.2f ms", self.settings.model_name, stage, 1e3 * seconds)
        return logits[: len(ids)], seconds

    def model_output_process(self, model_inputs: dict[str, Any], outputs: Any, input_dict: dict[str, Any]) -> None:
        """Choose each row's next token by the logits `outputs`, and put into `input_dict` what the next step needs."""
        active = model_inputs["is_active"]
        lengths = model_inputs["attention_mask"].sum(1) if input_dict["is_prefill"] else active.astype(np.int64)
        chosen = self._choose(np.asarray(outputs), active, input_dict)
        for tokens, token, is_active in zip(input_dict["generate_ids"], chosen.tolist(), active, strict=True):
            if is_active:
                tokens.append(token)
        input_dict["input_ids"], input_dict["is_prefill"] = chosen[:, None], False
        input_dict["kv_len"] = input_dict["kv_len"] + lengths
        input_dict["is_finished"] = ~active | np.isin(chosen, self._ends)

    def get_jump_flag(self, cnt: int, warm_up: bool = False) -> bool:
        """Whether to stop after `cnt` steps: those of the settings, or two for a warm-up."""
        return cnt >= (WARM_UP_STEPS if warm_up else self.settings.max_new_tokens)

    def mark_inputs(self, model_inputs: dict[str, Any]) -> None:
        """Tell a compiler which inputs are static, before a step of a warm-up. Here all are, from the beginning."""

    def define_profiler(
        self,
        enable_profiler: bool = False,
        profile_save_path: str = "prof",
        active: int = 10,
        repeat: int = 1,
        skip_first: int = 10,
    ) -> AbstractContextManager[Any]:
        """What records steps, in a `with`; its `step()` is called after each.

        Of a model that PyTorch runs the files are torch.profiler's, with every operator; of a compiled one they hold
        when each step began and what it took. Both are Chrome's trace format: `steps-N.json` in the folder.

        Args:
            enable_profiler: False records nothing and writes nothing.
            profile_save_path: a folder, within `output_path` where that is set.
            active, repeat, skip_first: leave out `skip_first` steps, then record `active`, `repeat` times; 0 is always.
        """
        for name, value, least in (("active", active, 1), ("repeat", repeat, 0), ("skip_first", skip_first, 0)):
            if value < least:
                raise UsageError(f"{name} of define_profiler() must be at least {least}, not {value}.")
        self._skipped = skip_first
        if not enable_profiler:
            return nullcontext(NoProfiler())
        record = getattr(self.model, "profile", None) or trace_steps
        folder = Path(self.settings.output_path) / profile_save_path
        found: AbstractContextManager[Any] = record(folder=folder, active=active, repeat=repeat, skip_first=skip_first)
        return found

    # ------------------------------------------------------------ what hooks are called by

    @property
    def _opened(self) -> Any:
        if self.model is None:
            raise UsageError(f"The runner of {self.settings.model_name} has no model yet: call init_model() first.")
        return self.model

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("init_tokenizer() has left `tokenizer` unset; set it to a Tokenizer.")
        return self.tokenizer

    def _loads_online(self) -> bool:
        """Whether a checkpoint's weights are prepared now, not those of an artifact."""
        path, asked = self.settings.model_path, self.settings.enable_online_split_weight
        if self.model is not None:
            return self.settings.mode.mode != "compiled"
        if not path:
            raise UsageError("model_path is not set; name an artifact or a checkpoint, or give init_model() a model.")
        is_source = is_checkpoint(path)
        if asked is not None and asked != is_source:
            what = (
                "a checkpoint, whose weights are read when it starts" if is_source else "no checkpoint on this machine"
            )
            advice = f"Prepare them: precast export {quoted(path)} -o OUT" if is_source else "Name the checkpoint"
            raise UsageError(
                f"enable_online_split_weight={asked}, and {path} is {what}. {advice}, or leave the setting out."
            )
        return is_source

    def _init_model_with_online_splited_weight(self, changes: Mapping[str, Any]) -> None:
        """Open a checkpoint; where the mode is `compiled`, export it, which is done once for the same settings."""
        settings = self.settings
        sizes = {"batch_size": settings.batch_size, "sequence_length": settings.capacity, "dtype": settings.dtype}
        if settings.rank_options:
            sizes |= {"backend": "aoti", **settings.rank_options}
        elif settings.mode.mode == "compiled" and settings.dtype != "float32":
            # ONNX graphs compute in float32.
            sizes["backend"] = "export"
        self._open(changes, **sizes)

    def _init_model_with_offline_splited_weight(self, changes: Mapping[str, Any]) -> None:
        """Open an artifact, or its checkpoint in another mode than `compiled`."""
        settings = self.settings
        is_compiled = settings.mode.mode == "compiled"
        sizes = {"batch_size": settings.batch_size, "sequence_length": settings.capacity, "dtype": settings.dtype}
        # That of an artifact is known; any other is refused.
        ranks = {"nproc": settings.world_size} if settings.world_size > 1 else {}
        self._open(changes, **(ranks if is_compiled else sizes))
        if is_compiled and self.model.variant.dtype != settings.dtype:
            log.info("dtype=%s: %s was compiled in %s.", settings.dtype, settings.model_path, self.model.variant.dtype)

    def _open(self, changes: Mapping[str, Any], **options: Any) -> None:
        settings = self.settings
        if self.model is None:
            log.info("Loading %s in the mode %s", settings.model_path, settings.mode.mode)
            self.model = open_model(settings.model_path, settings.mode.mode, **options)
        self._check_model()
        self.check_model_cfg(self.model.config)
        self.model_cfg = self.update_model_cfg(self.model.config, changes)

    def _check_model(self) -> None:
        model, settings = self.model, self.settings
        if not hasattr(model, "session"):
            raise UsageError(f"{settings.model_name} continues no text, and a runner generates: {model!r:.200}.")
        for name, asked, found in (
            ("batch_size", settings.batch_size, model.batch_size),
            ("input_max_len + max_new_tokens =", settings.capacity, model.capacity),
        ):
            if asked > found:
                raise UsageError(
                    f"The settings ask for {name} {asked}, and {model!r} holds {found}. Ask for less, or compile it "
                    f"for more: precast export … --batch-size {settings.batch_size} --sequence-length "
                    f"{settings.capacity}"
                )

    def _process_weight_after_loading(self) -> None:
        """Put the weights where, and make them what, the kernels want."""
        self.to_device()
        if not self._is_online:
            self.scale_dtype_adapter()
            self.cast_format()

    def _generate_batch(self, texts: Sequence[str], first: int, warm_up: bool, profiler: Any) -> list[list[int]]:
        """The tokens of the answers to one batch."""
        input_dict = self._begin(texts, first)
        self._session, cnt = self.model.session(), 0
        while not self.get_jump_flag(cnt, warm_up) and (warm_up or not input_dict["is_finished"].all()):
            is_prefill = input_dict["is_prefill"]
            model_inputs = self.model_input_prepare(input_dict)
            outputs = self.model_inference(model_inputs, is_prefill=is_prefill, warm_up=warm_up)
            logits, seconds = _pair_of(outputs)
            self.model_output_process(model_inputs, logits, input_dict)
            if warm_up:
                # Both steps are run, whatever the first one ends.
                input_dict["is_finished"][:] = False
            self.timing.add(seconds, is_prefill=is_prefill)
            profiler.step()
            cnt += 1
        answers: list[list[int]] = input_dict["generate_ids"]
        return answers

    def _begin(self, texts: Sequence[str], first: int) -> dict[str, Any]:
        """What the hooks hand each other, before the prefill."""
        inputs = self.tokenize_prompts(texts)
        rows = [row[mask == 1] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        return {
            **inputs,
            "generate_ids": [[] for _ in texts],
            "input_lens": np.array([len(row) for row in rows]),
            "kv_len": np.zeros(len(texts), np.int64),
            "is_prefill": True,
            "is_finished": np.zeros(len(texts), bool),
            "samplers": [self._make_sampler(row, first + index) for index, row in enumerate(rows)],
        }

    def _make_sampler(self, row: Array, index: int) -> Sampler:
        settings, draws = self.settings, self.settings.temperature > 0
        config = GenerationConfig(do_sample=draws, temperature=settings.temperature or 1.0, top_p=settings.top_p,
                                  top_k=settings.top_k)  # fmt: skip
        generator = np.random.default_rng([settings.seed, index]) if draws else None
        return Sampler(Processors(config, Prompt(row, row, index), settings.max_new_tokens), generator)

    def _choose(self, logits: Array, active: Array, input_dict: dict[str, Any]) -> Array:
        """The next token of every row, int64 [rows]; 0 for rows that have ended."""
        found = np.zeros(len(logits), np.int64)
        for index in np.flatnonzero(active):
            check_logits(logits[index], len(input_dict["generate_ids"][index]) + 1)
            sampler, tokens = input_dict["samplers"][index], np.array(input_dict["generate_ids"][index], np.int64)
            found[index] = sampler.pick(sampler.process(tokens, logits[index]))
        return found

    @property
    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        config = getattr(self.model, "generation_config", None)
        end = self._tokenizer.token_id("eos")
        return config.eos_ids if config is not None and config.eos_ids else [] if end is None else [end]

    def _profiler(self, warm_up: bool) -> AbstractContextManager[Any]:
        return self.define_profiler(enable_profiler=self.settings.enable_profiler and not warm_up)

    def _warn_without_trace(self, warm_up: bool) -> None:
        steps, skipped = len(self.timing.prefill) + len(self.timing.decode), self._skipped
        if self.settings.enable_profiler and not warm_up and steps <= skipped:
            log.warning("There is no trace: of %d steps the first %d are left out. Ask for more max_new_tokens, or "
                        "override define_profiler().", steps, skipped)  # fmt: skip

    def _log_answers(self, answers: Iterable[str]) -> None:
        if (average := self.timing.average_step) is not None:
            log.info("%s average inference time cost is %.2f ms", self.settings.model_name, 1e3 * average)
        for index, answer in enumerate(answers):
            log.info("Inference decode result for batch %d: \n%s", index, answer)

    @contextmanager
    def _log_file(self) -> Any:
        """While it generates, lines go to `log_0.log` in `output_path`, too."""
        if not self.settings.output_path:
            yield
            return
        folder = Path(self.settings.output_path)
        folder.mkdir(parents=True, exist_ok=True)
        handler, level = logging.FileHandler(folder / "log_0.log", encoding="utf-8"), log.level
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(min(logging.INFO, level or logging.INFO))
        try:
            yield
        finally:
            log.setLevel(level)
            log.removeHandler(handler)
            handler.close()


def _check_override(cls: type, name: str, given: Any) -> None:
    """Raise UsageError for what stands in the place of a hook and cannot be called as the hook is."""
    place = f"{cls.__name__}.{name}"
    if not inspect.isfunction(given):
        raise UsageError(f"{place} overrides a hook and is no method: {given!r:.80}. Define it by def.")
    taken, expected = inspect.signature(given).parameters, inspect.signature(getattr(ModelRunner, name)).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    missing = [each for each in expected if each not in taken and not takes_any]
    needed = [
        each.name
        for each in taken.values()
        if each.name not in expected
        and each.default is each.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    if missing or needed:
        raise UsageError(
            f"{place}{inspect.signature(given)} overrides a hook that is called as "
            f"{name}{inspect.signature(getattr(ModelRunner, name))}. Take the same arguments, by the same names."
        )


def _text_of(prompt: Any) -> str:
    text = prompt.get("text") if isinstance(prompt, Mapping) else prompt
    if not isinstance(text, str):
        raise InputError(f'A prompt is a text, or a mapping {{"text": …}}; this is {prompt!r:.80}.')
    return text


def _pair_of(outputs: Any) -> tuple[Any, float]:
    """What model_inference() gives: logits and seconds. Raises UsageError for anything else."""
    if not isinstance(outputs, tuple) or len(outputs) != 2 or not isinstance(outputs[1], float | int):
        raise UsageError(f"model_inference() must return (logits, seconds), not {type(outputs).__name__}.")
    return outputs
