"""The artifact contract: what `config.json["precast"]` may hold, as closed, frozen types.

A field that is not here is an error, so is a value of another type or beyond its bound. Adding a field raises
`FORMAT_VERSION`, once per release; it gets a default that says what older artifacts meant, and is left out where it is
that, since their digests were made without it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

__all__ = [
    "FORMAT_VERSION",
    "PATH_PATTERN",
    "STANDALONE_ABI",
    "Accuracy",
    "CacheLayer",
    "Compiler",
    "Contract",
    "Dim",
    "File",
    "Frames",
    "Graph",
    "Host",
    "Input",
    "Lora",
    "LoraTarget",
    "MergedAdapter",
    "Output",
    "Prefix",
    "Ranks",
    "Shapes",
    "Source",
    "Split",
    "Stage",
    "State",
    "Variant",
]

FORMAT_VERSION = 3
STANDALONE_ABI = 1
"""The version of the interface between the runtime and native libraries that stand alone."""

Size = Annotated[int, Meta(ge=0, le=2**31)]
Bytes = Annotated[int, Meta(ge=0, le=2**50)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
PATH_PATTERN = r"^[A-Za-z0-9_][\w.@+-]*(/[A-Za-z0-9_][\w.@+-]*)*\Z"
Path = Annotated[str, Meta(min_length=1, max_length=512, pattern=PATH_PATTERN)]
Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
Axis = Literal["batch", "texts", "length", "positions", "choices", "samples", "frames"]
Role = Literal["encode", "prefill", "decode", "decoder", "verify", "stage"]
Trust = Literal["data", "graph", "native"]


# msgspec does not pass kw_only on to subclasses, and type checkers do not pass frozen on: each class says both.
class _Closed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Dim(_Closed, frozen=True, kw_only=True):
    """A dimension that is free within bounds, both included."""

    min: Size
    max: Size


class Input(_Closed, frozen=True, kw_only=True, omit_defaults=True):
    """One input tensor of a graph. `pad` fills what the caller did not give, along the dimensions that `axes` names; a
    dimension without a name must be given in full. Format 1 had no names: an encoder's inputs were [batch, length]."""

    name: Name
    dtype: Dtype
    shape: list[Size | Dim]
    pad: int | float
    axes: list[Axis | None] = []


class Output(_Closed, frozen=True, kw_only=True):
    """One output tensor. `slice` names, per dimension, the axis along which it is cut back to the caller's size."""

    name: Name
    dtype: Dtype
    shape: list[Size | Dim]
    slice: list[Axis | None]


class CacheLayer(_Closed, frozen=True, kw_only=True):
    """The key/value cache of one layer: tensors `[batch, heads, capacity, head_dim]` that a graph updates in place."""

    layer: Size
    key_in: Name
    key_out: Name
    value_in: Name
    value_out: Name
    heads: Size
    head_dim: Size
    dtype: Dtype
    window: Size | None


class State(_Closed, frozen=True, kw_only=True):
    """A state of fixed size that a row carries from token to token, zero before its first. `shape` begins with the
    batch. Such a graph takes one token per row, and what goes in and what comes out have memory of their own."""

    name_in: Name
    name_out: Name
    shape: list[Size]
    dtype: Dtype


class Frames(_Closed, frozen=True, kw_only=True):
    """Frames of sound: the first looks at `size` samples, each further one is a `step` on. An answer takes at least
    `fewest` of them."""

    size: Size
    step: Size
    fewest: Size

    def count(self, samples: int) -> int:
        """The frames of so many samples."""
        return max(0, (samples - self.size) // self.step + 1)


class Graph(_Closed, frozen=True, kw_only=True, omit_defaults=True):
    """One compiled graph. `batch` is its number of rows, free within bounds since format 3; `length` its query (or
    sequence) length, in tokens or samples, `capacity` that of its cache (0: no cache). `frames` says how many frames
    its outputs have of so many samples."""

    name: Name
    role: Role
    file: Path
    batch: Size | Dim
    length: Size | Dim
    capacity: Size
    inputs: list[Input]
    outputs: list[Output]
    cache: list[CacheLayer]
    frames: Frames | None = None
    states: list[State] = []

    @property
    def slots(self) -> int:
        """The rows that the graph has at most, each with a cache row and a length of its own."""
        return self.batch.max if isinstance(self.batch, Dim) else self.batch


class Host(_Closed, frozen=True, kw_only=True):
    """What a machine must have. An empty list allows anything; versions are minimums, `{distribution: version}`."""

    platforms: list[Name]
    device: Name
    isa: list[Name]
    min_versions: dict[Name, Name]


class Compiler(_Closed, frozen=True, kw_only=True):
    """What made the files, for the record."""

    name: Name
    version: Name
    options: dict[Name, str | int | float | bool]
    torch: Name
    transformers: Name


class Accuracy(_Closed, frozen=True, kw_only=True):
    """What validation found. `figures` are rounded to two digits, so that they repeat."""

    status: Literal["passed", "accepted", "skipped"]
    reason: Text
    figures: dict[Name, int | float]


class Split(_Closed, frozen=True, kw_only=True, omit_defaults=True):
    """How a weight is divided between ranks: along `dim`, in each of so many equal `blocks`, into as many parts as
    there are ranks, or into fewer, each of which is that of `copies` ranks one after the other."""

    dim: Annotated[int, Meta(ge=0, le=7)]
    blocks: Annotated[int, Meta(ge=1, le=8)] = 1
    copies: Annotated[int, Meta(ge=1, le=1024)] = 1


class Ranks(_Closed, frozen=True, kw_only=True):
    """Tensor parallelism: `count` processes, or cores of a device, run the same graphs at once, each with its part of
    the weights.

    `splits` says how weights are divided, by their names with `*` in the place of numbers; all others are whole. They
    are `stored` in as many parts, in files `rank_N/…`, with what all ranks share in a file beside these; or in one,
    where each rank reads its parts out of whole weights. `degrees` are the parts that single kinds of modules have,
    where these are fewer. Heads of caches are those of one rank.
    """

    count: Annotated[int, Meta(ge=2, le=1024)]
    splits: Annotated[dict[Name, Split], Meta(min_length=1, max_length=4096)]
    degrees: dict[Name, Size]
    stored: Annotated[int, Meta(ge=1, le=1024)]


class Stage(_Closed, frozen=True, kw_only=True):
    """One of the runs of layers that a decoder is cut into, each run by a process of its own.

    It has a part of each of the variant's graphs, by the same names and in the same order, and `weights` that no other
    stage reads. A part takes the inputs of the whole step, what stages before it make (any further output that is no
    cache), and the caches of its own layers; the last makes the logits.
    """

    graphs: list[Graph]
    weights: list[Path]


class Variant(_Closed, frozen=True, kw_only=True, omit_defaults=True):
    """One compiled form of the model.

    Native libraries that stand alone have the version `abi` of the interface to the runtime; those that do not call
    what `requires_torch` names, which only PyTorch has. Where there are `stages`, `graphs` describe what these do one
    after the other, and the file of each is that of its first stage.
    """

    name: Name
    backend: Name
    dtype: Dtype
    quantization: Name | None
    kv_cache: Name | None
    host: Host
    compiler: Compiler
    trust: Trust
    accuracy: Accuracy
    weights: list[Path]
    graphs: list[Graph]
    abi: Size = 0
    requires_torch: list[Name] = []
    ranks: Ranks | None = None
    stages: list[Stage] = []


class MergedAdapter(_Closed, frozen=True, kw_only=True):
    """An adapter that was merged into the weights, `weight` times: a Hub id or a local base name, and the hash of its
    files."""

    name: Name
    sha256: Sha256
    weight: float


class Source(_Closed, frozen=True, kw_only=True, omit_defaults=True):
    """Where the weights came from: a Hub id or a local base name, never a path; and what was merged into them since, in
    this order. `weights_sha256` is of the weights before that."""

    model: Name
    revision: Name | None
    weights_sha256: Sha256
    adapters: list[MergedAdapter] = []


class Shapes(_Closed, frozen=True, kw_only=True):
    """The static shapes. `sequence_length`: for encoders the compiled lengths, for decoders the cache's capacity."""

    batch_size: Size
    sequence_length: list[Size]
    prefill_lengths: list[Size]
    dynamic_batch_size: bool


class Prefix(_Closed, frozen=True, kw_only=True):
    """Keys and values that lie in the first `length` cache positions of every row. `file` holds them in float32,
    `[heads, length, width]` under the names of the caches' inputs. A prompt's first token has the position `length`
    where `positions` is "after", and 0 where it is "from-zero". `source_sha256` is the hash of what they were read
    from."""

    file: Path
    length: Size
    method: Literal["prefix-tuning", "prompt-tuning", "p-tuning", "pre-caches"]
    positions: Literal["after", "from-zero"]
    source_sha256: Sha256


class LoraTarget(_Closed, frozen=True, kw_only=True):
    """A linear layer that adapters may change: its module's name in the checkpoint's model, and its width on the way in
    and on the way out."""

    module: Name
    inputs: Size
    outputs: Size


class Lora(_Closed, frozen=True, kw_only=True):
    """LoRA adapters that are loaded at run time, as many as `slots` at once and of ranks up to `rank`. Every graph has
    an input for each target's slots and one that says which of them each row has, 0 for none; see `artifact.lora`."""

    slots: Size
    rank: Size
    targets: Annotated[list[LoraTarget], Meta(min_length=1, max_length=65536)]


class File(_Closed, frozen=True, kw_only=True):
    """Size in bytes and content hash of a listed file."""

    size: Bytes
    sha256: Sha256


class Contract(_Closed, frozen=True, kw_only=True, omit_defaults=True):
    """All of `config.json["precast"]`."""

    format_version: Size
    precast_version: Name
    digest: Sha256
    task: Name
    source: Source
    shapes: Shapes
    variants: Annotated[list[Variant], Meta(min_length=1, max_length=64)]
    files: Annotated[dict[Path, File], Meta(max_length=4096)]
    prefix: Prefix | None = None
    lora: Lora | None = None
