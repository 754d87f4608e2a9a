"""`CompiledModel`: an artifact, opened and ready to answer."""

from __future__ import annotations

import inspect
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..advice import suggest_larger
from ..arguments import only_known, read_token, refuse_replaced, refuse_unknown, rename
from ..artifact import Artifact, read_artifact, vocabulary_of
from ..artifact.backends import get_backend
from ..artifact.integrity import identity, require_trust
from ..artifact.publish import copy_artifact
from ..artifact.schema import Variant
from ..artifact.stages import rank_count
from ..artifact.tasks import get_task, kind_of_roles
from ..distributed.checks import check_asked, check_stored
from ..engines import Engine, Settings, open_engine, replicas_of
from ..engines.footprint import measure_footprint
from ..engines.providers import check_provider, default_device
from ..engines.warmup import bind_blank
from ..errors import ArtifactError, InputError, UsageError
from ..hosts.neuron_cores import read_cores
from ..hosts.select import choose_variant, this_machine
from ..inputs.companions import companions_of
from ..inputs.tokenizer import Tokenizer
from ..progress import progress
from ..storage import hub
from .exporting import export_once
from .transformers_compat import Config, ForTransformers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CompiledModel", "Opening"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Opening:
    """How a model was opened, so that another process can open the same. No token is in it.

    Attributes:
        model: the directory or the Hub repository that was named.
        revision, subfolder, local_files_only, threads, prepack, device, provider: as of `from_pretrained`.
    """

    model: str
    revision: str | None = None
    subfolder: str | None = None
    local_files_only: bool = False
    threads: int = 0
    prepack: bool = True
    device: str | None = None
    provider: str | None = None


class CompiledModel(ForTransformers):
    """A compiled model. `CompiledModel.from_pretrained` picks the class that fits the artifact's task.

    Calls from several threads are served one after the other; `new_session()` gives a thread its own buffers over the
    same weights.
    """

    task: str | None = None
    opening: Opening | None = None
    """How it was opened; None of one that was made by hand."""

    def __init__(self, artifact: Artifact, variant: Variant, engine: Engine) -> None:
        self.artifact, self.variant, self._engine = artifact, variant, engine
        self.config = Config(artifact.config)
        self._lock = threading.RLock()
        self._tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        contract = self.artifact.contract
        sizes = {name: getattr(contract.shapes, name) for name in ("batch_size", "sequence_length", "prefill_lengths")}
        facts = {"task": contract.task, **sizes, "backend": self.variant.backend, "device": self.variant.host.device}
        told = [f"{name}={value!r}" for name, value in facts.items() if value != []]
        return f"{type(self).__name__}({', '.join([repr(str(self.artifact.path)), *told])})"

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | None = None,
        provider: str | None = None,
        threads: int = 0,
        prepack: bool = True,
        variant: str | None = None,
        verify: bool = False,
        sha256: str | None = None,
        trust_native_code: bool = False,
        cores: str | Sequence[int] | None = None,
        nproc: int | None = None,
        rank_timeout: float | None = None,
        log_dir: str | Path | None = None,
        export: bool = False,
        **export_options: Any,
    ) -> Self:
        """Open an artifact: a local directory, or a Hub repository, which is downloaded first.

        Args:
            model: the directory or `user/repo`.
            revision, token, cache_dir, local_files_only, force_download: of a Hub download, as in huggingface_hub.
            subfolder: the artifact's folder in the directory or repository.
            device: where to run: "cpu", "cuda", and what else a provider serves ("gpu", "npu", "coreml"). By default
                where the variant was compiled to run, or the provider's own.
            provider: what runs an `onnx` artifact: "cpu", "cuda", "tensorrt", "openvino" or "coreml", by default the
                first that serves the device. What this build of ONNX Runtime lacks is refused, with what it has and
                how to get the other. Accuracy was checked on the CPU. Tensors stay in the host's memory and are
                copied at every step: an encoder gains by a GPU, a decoder's caches cost it.
            threads: how many; 0 is one per usable core.
            prepack: when the model is first opened, save its weights as this machine's kernels want them (up to twice
                their size; of graphs that share nothing, no further one once they take 2.5 times that); later it opens
                in half the time, and all processes share that memory. The environment can say no for all models,
                PRECAST_PREPACK=0, and how much may be kept, PRECAST_PREPACK_GB=20. `precast cache` shows and clears it.
            variant: the name of the compiled form to use; by default the first that runs here.
            verify: hash every file anew, whatever was verified before.
            sha256: the artifact's digest as you know it; anything else is refused.
            trust_native_code: open native code from elsewhere.
            cores: Neuron: the NeuronCores to use, as "0-3", counted among those that the process sees; by default the
                first that the model needs. With more of them the model is opened several times: slices of a batch run
                side by side, and `new_session()` goes to the next.
            nproc: how many processes are to run the model, for an artifact that was compiled for so many
                (`tensor_parallel`, `pipeline_parallel`); any other number is refused. By default as many as it was
                compiled for. This one is rank 0 and starts the others, unless torchrun has.
            rank_timeout: how many seconds such a process waits for another in a step, or to begin one, before all end;
                by default 60.
            log_dir: a folder for what the processes that are started write, `rank_1.log` and so on, which stay there;
                files that are there are written on. By default a folder for temporary files, which stays only where
                something went wrong.
            export: `model` is a checkpoint; export it first, with `export_options` as for
                `precast.exporter.export` (needs `pip install 'precast[export]'`). What was made of the same files with
                the same options and versions before is opened as it is. Options that optimum-neuron, MindFormers and
                transformers have, too, may be spelled as there.

        Raises:
            ArtifactError: its subclasses say what is wrong with the artifact, the host, or the download.
            UsageError: the task does not fit this class, or an argument is unknown.
        """
        if "use_auth_token" in export_options:
            token = _one_token(token, export_options.pop("use_auth_token"))
        if not export:
            refuse_replaced("from_pretrained(MODEL, export=True", export_options)
            hint = " Those of an export go with export=True." if export_options else ""
            refuse_unknown("from_pretrained()", export_options, _OPEN_OPTIONS, hint)
        _check_arguments(
            model, threads, revision=revision, subfolder=subfolder, device=device, provider=provider, variant=variant,
            sha256=sha256,
        )  # fmt: skip
        of_ranks = _read_rank_options(rank_timeout, log_dir)
        if export:
            # An `onnx` artifact is told where to run when it is opened; others are compiled for that.
            if device is not None and export_options.get("backend", "onnx") != "onnx":
                export_options["device"] = device
            model = export_once(model, revision=revision, token=token, **export_options)
        path = hub.locate(
            model, revision=revision, subfolder=subfolder, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, force_download=force_download,
        )  # fmt: skip
        while True:
            before = identity(path / "config.json")
            try:
                settings = Settings(threads, prepack, verify, provider=provider, cores=read_cores(cores), **of_ranks)
                opened = cls._open_artifact(path, settings, device, variant, sha256, trust_native_code, nproc)
            except ArtifactError:
                if identity(path / "config.json") == before:
                    raise
            else:
                if identity(path / "config.json") == before:
                    opened.opening = Opening(
                        str(model), revision, subfolder, local_files_only, threads, prepack, device, provider
                    )
                    return opened
            # An export has just replaced the artifact, so what was read may be half of each: once more.

    @classmethod
    def _open_artifact(
        cls,
        path: Path,
        settings: Settings,
        device: str | None,
        variant: str | None,
        sha256: str | None,
        trust_native_code: bool,
        nproc: int | None,
    ) -> Self:
        artifact = read_artifact(path)
        check_provider(device, settings.provider, [each.host.device for each in artifact.contract.variants])
        chosen = choose_variant(
            artifact.contract, this_machine(artifact.contract), variant, device=device, provider=settings.provider,
            root=artifact.path,
        )  # fmt: skip
        home = default_device(settings.provider) if settings.provider else chosen.host.device
        settings = replace(settings, device=device or home)
        _check_cores(settings.cores, chosen)
        check_asked(chosen, nproc, settings)
        target = cls._class_for(artifact)
        verify_artifact(artifact, chosen, force=settings.verify)
        _check_trust(artifact, chosen, sha256, trust_native_code)
        return target(artifact, chosen, _open_engine(artifact, chosen, settings))

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer, opened when first used. Raises ArtifactError where it has none."""
        if self._tokenizer is None:
            # What generates is given ids and their mask, whatever else its tokenizer could make.
            names = ("input_ids", "attention_mask") if self.can_generate() else None
            self._tokenizer = Tokenizer(self.artifact.path, companions_of(self.artifact), names=names)
        return self._tokenizer

    @property
    def batch_size(self) -> int:
        """The compiled batch size."""
        return self.artifact.contract.shapes.batch_size

    @property
    def runs_on(self) -> str:
        """The device that runs its graphs."""
        opening = self.opening or Opening("")
        home = default_device(opening.provider) if opening.provider else self.variant.host.device
        return opening.device or home

    @only_known
    def new_session(self) -> Self:
        """The same model with its own buffers and lock, for another thread. Weights are shared."""
        other = type(self)(self.artifact, self.variant, self._engine, **self._shared_parts())
        other.opening = self.opening
        return other

    def _shared_parts(self) -> dict[str, Any]:
        """What sessions share beside the engine, as arguments of the class."""
        return {}

    @only_known
    def warm_up(self) -> float:
        """Run every graph once, over nothing but padding, and return the seconds it took: graphs are opened when they
        are first used, and on some devices loaded only then, so the first request is no slower afterwards."""
        started = time.perf_counter()
        with self._lock:
            caches = [dict(self._held_inputs()) for _ in range(replicas_of(self._engine))]
            for graph in self.variant.graphs:
                # An engine with replicas gives calls to them in turn, those with the same caches to the same one.
                for held in caches:
                    bind_blank(self._engine, graph, held)()
        return time.perf_counter() - started

    def _held_inputs(self) -> dict[str, Array]:
        """Inputs of graphs that this model holds beside caches, by name."""
        return {}

    @only_known
    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of the model's tensors, as transformers counts them: parameters and buffers, each once.

        Those of the artifact are counted as they are stored, so a quantized model's scales and zero points are, too,
        which transformers leaves out. Caches and what a graph computes in are not among them.

        Args:
            return_buffers: with tensors of whole numbers and truth values, such as positions.
        """
        found = measure_footprint(self.artifact, self.variant)
        return found.parameters + (found.buffers if return_buffers else 0)

    @only_known
    def save_pretrained(self, save_directory: str | Path, *, force: bool = False) -> None:
        """Copy the artifact to a directory, all or nothing. Raises PublishError."""
        copy_artifact(self.artifact, Path(save_directory), force=force)
        hub.say_left_out(self.artifact)

    def push_to_hub(self, *names: str | Path, **options: Any) -> str:
        """Upload the artifact as one commit and return the commit's address.

        Args:
            names: the repository, `user/name`, or `name` alone for one of whoever is logged in; as in optimum-neuron
                with repository_id also the directory that `save_pretrained` wrote.
            options: as for `hub.push`; repository_id is another name of repo_id, use_auth_token of token.

        Raises HubError, and UsageError for an option that there is not, and a directory that holds something else.
        """
        options = rename("push_to_hub()", options, {"repository_id": "repo_id", "use_auth_token": "token"})
        refuse_unknown("push_to_hub()", options, ["repo_id", *_PUSH_OPTIONS])
        if "token" in options:
            options["token"] = read_token(options["token"])
        return hub.push(*self._read_names(names, options), **options)

    def _read_names(self, names: Sequence[str | Path], options: dict[str, Any]) -> tuple[Artifact, str]:
        """The artifact to push, and the repository, which is taken out of `options`."""
        places = [*names, *([options.pop("repo_id")] if "repo_id" in options else [])]
        if not 1 <= len(places) <= 2 or not isinstance(places[-1], str):
            raise UsageError(
                f"push_to_hub() takes a repository, and before it at most the directory that save_pretrained() wrote, "
                f"as in push_to_hub('user/name') or push_to_hub('out', repository_id='user/name'); it was given "
                f"{', '.join(map(repr, places)) or 'neither'}."
            )
        artifact = self.artifact if len(places) == 1 else read_artifact(Path(places[0]))
        if artifact.contract.digest != self.artifact.contract.digest:
            raise UsageError(
                f"{places[0]} does not hold this model but one of digest {artifact.contract.digest[:12]}…, where this "
                f"one's is {self.artifact.contract.digest[:12]}…. Open it to push it, or write this one there: "
                f"model.save_pretrained({str(places[0])!r}, force=True)."
            )
        return artifact, places[-1]

    def _batch_slices(self, count: int) -> list[slice]:
        """Split a batch of `count` rows into slices that run one by one. Raises InputError where it is larger than
        compiled for and dynamic_batch_size is off."""
        size, shapes = self.batch_size, self.artifact.contract.shapes
        if count > size and not shapes.dynamic_batch_size:
            raise InputError(
                f"The batch has {count} rows; the model was compiled for {size}. Split it, or compile with "
                f"batch_size={count}, or with dynamic_batch_size=True, which runs larger batches in slices of {size}."
            )
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _vocabulary_size(self) -> int | None:
        return vocabulary_of(self.config)

    def _suggest_larger(self, length: int, more: str = "") -> str:
        """A sentence with the command that compiles the model for this length, and for `more`, further flags."""
        flags = f"--batch-size {self.batch_size} --sequence-length {length}{more}"
        return suggest_larger(self.artifact, flags, length)

    @classmethod
    def _class_for(cls, artifact: Artifact) -> type[Self]:
        roles = [graph.role for graph in artifact.contract.variants[0].graphs]
        task = get_task(artifact.contract.task, kind_of_roles(roles))
        module, _, name = task.model_class.partition(":")
        found: type[CompiledModel] = getattr(import_module(module), name)
        if not issubclass(found, cls):
            raise UsageError(
                f"{artifact.path} was compiled for {task.name}, which {cls.__name__} does not do. Open it with "
                f"{name}.from_pretrained or CompiledModel.from_pretrained."
            )
        return found


def _keyword_names(function: Any) -> list[str]:
    return [each.name for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]


_OPEN_OPTIONS, _PUSH_OPTIONS = _keyword_names(CompiledModel.from_pretrained), _keyword_names(hub.push)
_MOST_THREADS = 1024


def _one_token(token: str | None, other: Any) -> Any:
    """The token that is given as `token` or `use_auth_token`. Raises UsageError for two different ones."""
    if token is not None and other not in (None, token):
        raise UsageError("from_pretrained() was given token and use_auth_token, which are names of the same; pass one.")
    return token if token is not None else read_token(other)


def _check_arguments(model: Any, threads: Any, **texts: Any) -> None:
    """Raise UsageError for an argument of from_pretrained() that is of another type, or out of range."""
    if not isinstance(model, str | os.PathLike):
        raise UsageError(f"model must be a directory or a Hub repository, not {model!r:.80}.")
    if not isinstance(threads, int) or not 0 <= threads <= _MOST_THREADS:
        raise UsageError(
            f"threads must be a whole number from 0, which is one per core, to {_MOST_THREADS}, not {threads!r:.80}."
        )
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{name} must be a str, not {text!r:.80}.")


def _read_rank_options(rank_timeout: Any, log_dir: Any) -> dict[str, Any]:
    """What is said of ranks, as Settings has it. Raises UsageError."""
    is_number = isinstance(rank_timeout, int | float) and not isinstance(rank_timeout, bool)
    if rank_timeout is not None and not (is_number and 0 < rank_timeout < math.inf):
        raise UsageError(f"rank_timeout must be a number of seconds above 0, not {rank_timeout!r:.80}.")
    if log_dir is not None and not isinstance(log_dir, str | os.PathLike):
        raise UsageError(f"log_dir must be the path of a folder, not {log_dir!r:.80}.")
    return {"rank_timeout": rank_timeout, "log_dir": log_dir if log_dir is None else Path(log_dir)}


def verify_artifact(artifact: Artifact, variant: Variant, *, force: bool = False) -> None:
    """Check size and hash of every file that `variant` needs, with a progress bar, and keep the small ones that say how
    to prepare inputs and how to answer. Raises IntegrityError."""
    files = artifact.variant_files(variant)
    with progress("Verifying", sum(file.size for file in files.values())) as advance:
        artifact.contents.verify(files, force=force, advance=advance)
    artifact.contents.keep(name for name in artifact.companions() if name in files)


def _check_cores(cores: Sequence[int], variant: Variant) -> None:
    if cores and variant.host.device != "neuron":
        raise UsageError(
            f"cores={','.join(map(str, cores))} are NeuronCores, and the variant {variant.name} runs on "
            f"{variant.host.device}. Leave it out; threads= says how much of a CPU to use."
        )


def _check_trust(artifact: Artifact, variant: Variant, sha256: str | None, trust_native_code: bool) -> None:
    digest = artifact.contract.digest
    if sha256 is not None and sha256 != digest:
        raise ArtifactError(f"The digest of {artifact.path} is {digest}, not {sha256} as pinned by sha256=.")
    # The tier is the backend's, whatever the file claims for itself.
    if "native" in (variant.trust, get_backend(variant.backend).trust):
        require_trust(str(artifact.path), digest, sha256=sha256, trust_native_code=trust_native_code)


def _open_engine(artifact: Artifact, variant: Variant, settings: Settings) -> Engine:
    if variant.ranks:
        check_stored(artifact, variant.ranks)
    if rank_count(variant) == 1 or get_backend(variant.backend).runs_ranks:
        return open_engine(artifact, variant, settings)
    # What one process runs needs none of it.
    from ..distributed.opening import open_ranks

    return open_ranks(artifact, variant, settings)
