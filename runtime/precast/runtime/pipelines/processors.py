"""Images and sounds -> arrays, by the rules of the checkpoint's preprocessor_config.json.

The common rules are done here, with Pillow and numpy: images of ViT, DeiT, CLIP, SigLIP, SegFormer, BiT and BEiT,
sounds of wav2vec 2.0 and its kin and of Whisper. The others take transformers' own processors, which
`pip install 'precast[export]'` brings.
"""

from __future__ import annotations

import inspect
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ..companions import Readable, companions_at, laid_out
from ..errors import ArtifactError, FormatError, InputError, PrecastError, UsageError
from ..published import parse_object, select
from .log_mel import LogMel

__all__ = ["ImageProcessor", "SoundProcessor", "opened_image", "resized"]

Array = np.ndarray[Any, Any]

# The processors that do no more than resize, crop, rescale and normalize, and of what a size is that is one number.
_SQUARE, _SHORTER = ("height", "width"), ("shortest_edge",)
_COMMON = {"ViT": _SQUARE, "DeiT": _SQUARE, "Segformer": _SQUARE, "Beit": _SQUARE,
           "CLIP": _SHORTER, "Siglip": _SHORTER, "Bit": _SHORTER}  # fmt: skip
# What each step must be told; the defaults are transformers', and differ from class to class.
_TOLD = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_normalize": ("image_mean", "image_std"),
}
_CROPPING = ("DeiT", "CLIP", "Bit")
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


_Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
_PerChannel = Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)]


class _Rules(msgspec.Struct):
    """What the steps can be told here; transformers may make something of anything else."""

    size: _Side | dict[str, _Side] = 1
    crop_size: _Side | dict[str, _Side] = 1
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)] = 2
    rescale_factor: float = 1 / 255
    image_mean: _PerChannel | None = None
    image_std: _PerChannel | None = None


_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_SOUND: dict[str, Any] = {
    "feature_extractor_type": str,
    "sampling_rate": _Count,
    "max_length": _Count,
    "max_length_s": _Count,
    "do_normalize": bool,
}
"""What is used of a file about sounds."""

_USUAL = {
    "WhisperFeatureExtractor": ("whisper",),
    "ASTFeatureExtractor": ("audio-spectrogram-transformer",),
    "Wav2Vec2FeatureExtractor": (
        "wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "data2vec-audio", "sew", "unispeech", "unispeech-sat",
    ),
}  # fmt: skip
"""The classes of files that do not say theirs, and the kinds of models that they are for."""


class ImageProcessor:
    """Images as the model was trained to see them. Raises ArtifactError where the artifact does not say how."""

    def __init__(self, path: Path, files: Readable | None = None) -> None:
        self._files = files or companions_at(path)
        config = _config(path, self._files, "images")
        self.path, self.config = path, {name: value for name, value in config.items() if value is not None}
        # Files from before transformers 4.27 call it a feature extractor.
        self.kind = str(self.config.get("image_processor_type") or self.config.get("feature_extractor_type"))
        self._kind = self.kind.removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
        self._is_common = self._kind in _COMMON and self._is_plain() and self._is_told()
        self._theirs: Any = None

    def __call__(self, images: list[Any], **rules: Any) -> dict[str, Array]:
        """`pixel_values` float32 [images, channels, height, width], and what else transformers' processor makes.

        `rules` override those of the checkpoint. Raises InputError for images that come out in different sizes.
        """
        if self._is_common and not rules:
            return {"pixel_values": _together([self._pixels(image) for image in images])}
        if self._theirs is None:
            self._theirs = _from_transformers("AutoImageProcessor", self.kind, self._files)
        with _calling_transformers(f"transformers' {self.kind} does not prepare these images", InputError):
            found = self._theirs(images=images, return_tensors="np", **rules)
        return {name: np.asarray(value) for name, value in found.items() if name.startswith("pixel")}

    def _is_plain(self) -> bool:
        """Whether the file asks for nothing but the steps, in a form that they take."""
        asked = {name for name, value in self.config.items() if name.startswith("do_") and value}
        try:
            msgspec.convert(self.config, _Rules)
        except msgspec.ValidationError:
            return False
        crop = self.config.get("crop_size", 1)
        is_crop = isinstance(crop, int) or {"height", "width"} <= crop.keys()
        return asked <= set(_STEPS) and tuple(sorted(self._size())) in _SIZES and is_crop

    def _is_told(self) -> bool:
        """Whether the file says all that the steps take."""
        steps = {"do_resize": True, "do_normalize": True, "do_center_crop": self._kind in _CROPPING}
        needed = [name for step, own in steps.items() if self.config.get(step, own) for name in _TOLD[step]]
        if self._kind in _CROPPING:
            needed.append("do_center_crop")
        return all(name in self.config for name in needed)

    def _size(self) -> dict[str, int]:
        size = self.config.get("size", {})
        return dict.fromkeys(_COMMON.get(self._kind, ()), size) if isinstance(size, int) else size

    def _pixels(self, image: Any) -> Array:
        rules = self.config
        if rules.get("do_resize", True):
            image = image.resize(_target(image.size, self._size()), rules.get("resample", 2))
        pixels = np.asarray(image)
        if rules.get("do_center_crop", False):
            pixels = _cropped(pixels, rules["crop_size"])
        values = pixels.transpose(2, 0, 1)
        if rules.get("do_rescale", True):
            values = values.astype(np.float64) * rules.get("rescale_factor", 1 / 255)
        values = values.astype(np.float32)
        if rules.get("do_normalize", True):
            mean, deviation = (np.array(rules[f"image_{name}"], np.float32)[:, None, None] for name in ("mean", "std"))
            values = (values - mean) / deviation
        return values.astype(np.float32)


_SIZES = (_SQUARE, _SHORTER)


def _together(images: list[Array]) -> Array:
    sizes = {image.shape[1:] for image in images}
    if len(sizes) > 1:
        told = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise InputError(
            f"The images have {told} pixels once they are prepared, so they make no batch. Give each alone."
        )
    return np.stack(images)


def opened_image(given: Any) -> Any:
    """An image as Pillow has it, in colours: of a file, of an array uint8 [height, width, channels], or as it is.

    Raises UsageError without Pillow, InputError for anything else.
    """
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise UsageError("Images take Pillow: pip install 'precast[vision]'") from error
    if isinstance(given, np.ndarray):
        given = pillow.fromarray(given)
    elif isinstance(given, str | Path):
        try:
            given = pillow.open(given)
        except (OSError, ValueError) as error:
            raise InputError(f"{given} cannot be read as an image: {error}.") from error
    if not isinstance(given, pillow.Image):
        raise InputError(f"An image is a file, an array [height, width, 3] or a Pillow image; this is {given!r:.80}.")
    return given.convert("RGB")


def resized(values: Array, height: int, width: int) -> Array:
    """[..., h, w] -> [..., height, width], bilinear as torch's interpolate without align_corners."""
    for axis, size in ((-2, height), (-1, width)):
        old = values.shape[axis]
        place = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0).astype(np.float32)
        first = place.astype(np.int64)
        second = np.minimum(first + 1, old - 1)
        share = (place - first)[:, None] if axis == -2 else place - first
        values = np.take(values, first, axis) * (1 - share) + np.take(values, second, axis) * share
    return values


class SoundProcessor:
    """Sounds as the model was trained to hear them. Raises ArtifactError where the artifact does not say how."""

    def __init__(self, path: Path, files: Readable | None = None) -> None:
        self._files = files or companions_at(path)
        self.path, self._settings = path, _config(path, self._files, "sounds")
        self.config = select(self._settings, _SOUND, str(path / "preprocessor_config.json"))
        self.rate = int(self.config.get("sampling_rate", 16000))
        self.kind = self.config.get("feature_extractor_type") or self._usual_kind()
        self._theirs: Any = None

    def _usual_kind(self) -> str | None:
        """The class of a file that does not say it, by the kind of model."""
        data = self._files.get("config.json")
        model = parse_object(data, str(self.path / "config.json")).get("model_type") if data is not None else None
        return next((kind for kind, models in _USUAL.items() if model in models), None)

    @cached_property
    def longest(self) -> int | None:
        """The samples that are heard of a sound, where there is a limit; transformers would leave out the rest."""
        if self.kind == "WhisperFeatureExtractor":
            return self._log_mel.samples
        if self.kind == "ASTFeatureExtractor":
            # Frames of 25 milliseconds, one every 10.
            frames = int(self.config.get("max_length", 1024))
            return (frames - 1) * (self.rate // 100) + self.rate // 40 + self.rate // 100 - 1
        if self.kind == "ClapFeatureExtractor":
            # Of more it takes pieces at random.
            return int(self.config.get("max_length_s", 10)) * self.rate
        return None

    def __call__(self, sounds: list[Array]) -> dict[str, Array]:
        """`input_values` float32 [sounds, samples] with `attention_mask`, Whisper's `input_features` float32 [sounds,
        mels, frames], or what transformers' extractor makes.

        Raises InputError for a sound of more than `longest` samples.
        """
        longest = max(map(len, sounds))
        if self.longest is not None and longest > self.longest:
            raise InputError(
                f"The sound has {longest} samples ({longest / self.rate:.2f} seconds); the model hears "
                f"{self.longest} ({self.longest / self.rate:.2f} seconds). Give it in pieces, or cut it with "
                f"truncation=True."
            )
        if self.kind == "WhisperFeatureExtractor":
            return {"input_features": self._log_mel(sounds)}
        if self.kind == "Wav2Vec2FeatureExtractor":
            return self._waves(sounds)
        if self._theirs is None:
            self._theirs = _from_transformers("AutoFeatureExtractor", str(self.kind), self._files)
        with _calling_transformers(f"transformers' {self.kind} does not prepare these sounds", InputError):
            whole = {"truncation": False} if _cuts(self._theirs) else {}
            found = self._theirs(sounds, sampling_rate=self.rate, return_tensors="np", **whole)
        return {name: np.asarray(value) for name, value in found.items()}

    @cached_property
    def _log_mel(self) -> LogMel:
        try:
            return msgspec.convert(self._settings, LogMel)
        except msgspec.ValidationError as error:
            raise FormatError(f"{self.path / 'preprocessor_config.json'}: {error}.") from error

    def _waves(self, sounds: list[Array]) -> dict[str, Array]:
        width = max(map(len, sounds))
        values = np.zeros((len(sounds), width), np.float32)
        mask = np.zeros((len(sounds), width), np.int64)
        for index, sound in enumerate(sounds):
            values[index, : len(sound)] = _leveled(sound) if self.config.get("do_normalize", True) else sound
            mask[index, : len(sound)] = 1
        return {"input_values": values, "attention_mask": mask}

    def opened(self, given: Any) -> Array:
        """A sound, float32 [samples]: of a .wav file, an array, or {"raw" or "array": array, "sampling_rate": n}.

        Raises InputError for anything else, and for another sampling rate.
        """
        rate = self.rate
        if isinstance(given, dict) and "sampling_rate" in given and given.keys() & {"raw", "array"}:
            given, rate = given.get("raw", given.get("array")), given["sampling_rate"]
        elif isinstance(given, str | Path):
            given, rate = _wave(Path(given))
        if not isinstance(given, np.ndarray) or given.ndim != 1 or not given.size:
            raise InputError(
                f'A sound is a .wav file, an array [samples], or {{"raw": array, "sampling_rate": n}}; this is '
                f"{given!r:.80}."
            )
        if rate != self.rate:
            raise InputError(f"The sound has {rate} samples per second; the model takes {self.rate}. Resample it.")
        return given.astype(np.float32)


def _cuts(extractor: Any) -> bool:
    """Whether an extractor of transformers leaves out the end of long sounds unless it is told not to."""
    told = inspect.signature(extractor.__call__).parameters.get("truncation")
    return told is not None and told.default is True


def _target(size: tuple[int, int], asked: dict[str, int]) -> tuple[int, int]:
    """(width, height) of the resized image."""
    if "shortest_edge" not in asked:
        return asked["width"], asked["height"]
    short, long = sorted(size)
    edge = asked["shortest_edge"]
    longer = int(edge * long / short)
    return (edge, longer) if size[0] <= size[1] else (longer, edge)


def _cropped(pixels: Array, asked: Any) -> Array:
    """The middle of an image [height, width, channels], with black around it where it is smaller."""
    sizes = (asked, asked) if isinstance(asked, int) else (asked["height"], asked["width"])
    for axis, size in enumerate(sizes):
        missing = max(0, size - pixels.shape[axis])
        before = -(-missing // 2)
        pads = [(before, missing - before) if each == axis else (0, 0) for each in range(3)]
        pixels = np.pad(pixels, pads)
        start = (pixels.shape[axis] - size) // 2
        pixels = pixels.take(range(start, start + size), axis)
    return pixels


def _leveled(sound: Array) -> Array:
    """Mean 0 and variance 1, as wav2vec 2.0 was trained."""
    result: Array = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    return result


def _wave(path: Path) -> tuple[Array, int]:
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path} cannot be read as a .wav file: {error}. Give an array of samples instead.") from error
    if width == 1:
        values = raw.astype(np.float32) / 128 - 1
    else:
        # Little-endian samples of any width, moved to the top of 32 bits.
        wide = np.zeros((len(raw) // width, 4), np.uint8)
        wide[:, 4 - width :] = raw.reshape(-1, width)
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(1), rate


def _config(path: Path, files: Readable, what: str) -> dict[str, Any]:
    data = files.get("preprocessor_config.json")
    if data is None:
        raise ArtifactError(
            f"{path} has no preprocessor_config.json: its checkpoint does not say how {what} are prepared. Call the "
            f"model with arrays instead."
        )
    return parse_object(data, str(path / "preprocessor_config.json"))


def _from_transformers(name: str, kind: str, files: Readable) -> Any:
    """transformers' own processor. Raises UsageError where it is not installed, ArtifactError where it refuses."""
    what = f"transformers makes no processor of preprocessor_config.json, {kind}"
    try:
        with _calling_transformers(what, ArtifactError), laid_out(files) as path:
            return getattr(import_module("transformers"), name).from_pretrained(
                path, trust_remote_code=False, local_files_only=True
            )
    except ImportError as error:
        raise UsageError(
            f"{kind} is prepared by transformers, which is not installed or lacks something: {error}. "
            f"pip install 'precast[export]'"
        ) from error


@contextmanager
def _calling_transformers(what: str, kind: type[PrecastError]) -> Iterator[None]:
    """Within, whatever the library raises is of our `kind`, but for what is not installed."""
    try:
        yield
    except (ImportError, MemoryError, PrecastError):
        raise
    except Exception as error:
        # The library meets broken settings, and those that need code of their own, with errors of any type.
        said = " ".join(str(error).split())
        raise kind(f"{what}: {type(error).__name__}: {said:.300}") from error
