"""Images and sounds -> arrays, by the rules of the checkpoint's preprocessor_config.json.

The common rules are done here, with Pillow and numpy: images of the classes in image_rules.py, sounds of wav2vec 2.0
and its kin and of Whisper. The others take transformers' own processors, which `pip install 'precast[export]'` brings.
Which file and which class counts is as in transformers: its newer releases write processor_config.json with a part
for images and one for sounds; a file without a class means that of the model's type.
"""

from __future__ import annotations

import base64
import inspect
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ..artifact.published_json import parse_object, select
from ..errors import ArtifactError, FormatError, InputError, PrecastError, UsageError
from ..inputs.companions import Readable, companions_at, write_processor_files
from ..inputs.spectrogram import Spectrogram
from ..inputs.tensors import to_numpy
from .image_processing import find_class, read_rules
from .log_mel import LogMel
from .sound_files import as_samples, read_wave

__all__ = ["ImageProcessor", "SoundProcessor", "open_image", "interpolate"]

Array = np.ndarray[Any, Any]

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_SOUND_TYPES: dict[str, Any] = {
    "feature_extractor_type": str,
    "sampling_rate": _Count,
    "max_length": _Count,
    "max_length_s": _Count,
    "do_normalize": bool,
}
"""The settings that are read of a file about sounds, with their types."""

_USUAL = {
    "WhisperFeatureExtractor": ("whisper",),
    "ASTFeatureExtractor": ("audio-spectrogram-transformer",),
    "Wav2Vec2FeatureExtractor": (
        "wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "data2vec-audio", "sew", "unispeech", "unispeech-sat",
    ),
}  # fmt: skip
"""The classes of feature extractors, and the model types whose files may leave the class out."""


class ImageProcessor:
    """Prepares images by the checkpoint's preprocessor_config.json. Raises ArtifactError where there is none."""

    def __init__(self, path: Path, files: Readable | None = None) -> None:
        self._files = files or companions_at(path)
        self.path, self.config = path, _read_settings(path, self._files, "images", "image_processor")
        model = _model_config(path, self._files)
        self.kind = _image_class(self.config, model)
        known = find_class(self.kind, model.get("model_type"))
        self._rules = read_rules(known, self.config) if known else None

    @property
    def layout(self) -> str | None:
        """The order of an array's dimensions, if the file says it: "channels_first" or "channels_last"."""
        found = self.config.get("input_data_format")
        return found if found in ("channels_first", "channels_last") else None

    @cached_property
    def _transformers_processor(self) -> Any:
        return _from_transformers("AutoImageProcessor", self.kind, self._files)

    def __call__(self, images: list[Any], **rules: Any) -> dict[str, Array]:
        """`pixel_values` float32 [images, channels, height, width], and what else transformers' processor makes, of
        Pillow images in colours.

        `rules` override those of the checkpoint. Raises InputError for images that come out in different sizes.
        """
        if self._rules is not None and not rules:
            return {"pixel_values": _stack_images([self._rules.pixels(image) for image in images])}
        with _library_errors(f"transformers' {self.kind} does not prepare these images", InputError, str(self.kind)):
            found = self._transformers_processor(images=images, return_tensors="np", **rules)
            return {name: np.asarray(value) for name, value in found.items() if name.startswith("pixel")}


def _stack_images(images: list[Array]) -> Array:
    sizes = {image.shape[1:] for image in images}
    if len(sizes) > 1:
        told = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise InputError(
            f"The images have {told} pixels once they are prepared, so they make no batch. Give each alone."
        )
    return np.stack(images)


def open_image(given: Any, layout: str | None = None) -> Any:
    """Open an image as an upright RGB image of Pillow, from a file, base64 (data:image/png;base64,…), an array or a
    Pillow image.

    An array is [height, width], or has one or three channels, last or first: `layout` says which where both could be,
    "channels_first" without it, as in transformers. Its values are whole numbers from 0 to 255 of any dtype.
    Raises UsageError without Pillow, InputError for anything else and for images without a pixel.
    """
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise UsageError("Images take Pillow: pip install 'precast[vision]'") from error
    if isinstance(given, np.ndarray):
        given = pillow.fromarray(_to_rgb(given, layout))
    if isinstance(given, str | Path):
        # Decoders raise errors of any type for broken images, some only when the pixels are read.
        said = f"{given:.60}… cannot" if len(str(given)) > _LONGEST_NAME else f"{given} cannot"
        with _library_errors(f"{said} be read as an image", InputError), pillow.open(_open_source(given)) as image:
            return _turn_upright(image)
    if not isinstance(given, pillow.Image):
        raise InputError(f"An image is a file, an array [height, width, 3] or a Pillow image; this is {given!r:.80}.")
    if not all(given.size):
        raise InputError(f"The image has {given.height}x{given.width} pixels, so there is nothing to see.")
    with _library_errors("The image cannot be read", InputError):
        return _turn_upright(given)


_LONGEST_NAME = 300


def _open_source(given: str | Path) -> str | Path | io.BytesIO:
    """The source that Pillow opens: a file, or if there is none of this name the bytes of base64, as in transformers.
    Raises InputError for an address."""
    if isinstance(given, Path) or os.path.isfile(given):
        return given
    if given.startswith(("http://", "https://")):
        raise InputError(
            f"{given:.200} is an address, and pipelines download nothing. Download it yourself and give the file, or a "
            f"Pillow image: PIL.Image.open(io.BytesIO(data))."
        )
    text = given.partition(",")[2] if given.startswith("data:image/") else given
    try:
        return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
    except ValueError:
        return given


def _turn_upright(image: Any) -> Any:
    """Rotate an image as its EXIF data says, and convert it to RGB."""
    return import_module("PIL.ImageOps").exif_transpose(image).convert("RGB")


_CHANNELS: dict[str | None, tuple[int, ...]] = {None: (0, 2), "channels_first": (0,), "channels_last": (2,)}


def _to_rgb(given: Array, layout: str | None) -> Array:
    """An array as uint8 [height, width, 3]. Raises InputError for values that transformers' processors would take for
    other colours."""
    shape = "x".join(map(str, given.shape))
    if not given.size:
        raise InputError(f"The image is an array of {shape} values, so there is nothing to see.")
    if given.dtype.kind not in "iuf":
        raise InputError(f"The image is an array of {given.dtype}; give whole numbers from 0 to 255.")
    values, axes = (given[None], (0,)) if given.ndim == 2 else (given, _CHANNELS[layout])
    places = [axis for axis in axes if values.ndim == 3 and values.shape[axis] in (1, 3)]
    if not places:
        raise InputError(
            f"The image is an array of {shape} values: give [height, width], [height, width, channels] or [channels, "
            f"height, width] with one or three channels" + (f", {layout} as its file says." if layout else ".")
        )
    lowest, highest = values.min(), values.max()
    if not (lowest >= 0 and highest <= 255 and np.array_equal(values, np.trunc(values))):
        raise InputError(
            f"The image is an array of {given.dtype} with values from {lowest:g} to {highest:g}, but colours are whole "
            f"numbers from 0 to 255. Of shares of 1 make them: (image * 255).round().astype(np.uint8)"
        )
    colours = np.moveaxis(values, places[0], -1).astype(np.uint8)
    return np.repeat(colours, 3, -1) if colours.shape[-1] == 1 else np.ascontiguousarray(colours)


def interpolate(values: Array, height: int, width: int) -> Array:
    """Resize [..., h, w] to [..., height, width], bilinear as torch's interpolate without align_corners."""
    for axis, size in ((-2, height), (-1, width)):
        old = values.shape[axis]
        place = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0).astype(np.float32)
        first = place.astype(np.int64)
        second = np.minimum(first + 1, old - 1)
        share = (place - first)[:, None] if axis == -2 else place - first
        values = np.take(values, first, axis) * (1 - share) + np.take(values, second, axis) * share
    return values


class SoundProcessor:
    """Prepares sounds by the checkpoint's preprocessor_config.json. Raises ArtifactError where there is none."""

    def __init__(self, path: Path, files: Readable | None = None) -> None:
        self._files = files or companions_at(path)
        self.path = path
        self._settings = _read_settings(path, self._files, "sounds", "feature_extractor", "audio_processor")
        self.config = select(self._settings, _SOUND_TYPES, str(path / "preprocessor_config.json"))
        self.kind = self.config.get("feature_extractor_type") or self._usual_kind()

    def _usual_kind(self) -> str | None:
        """The class of a file that does not say it, by the model type."""
        model = _model_config(self.path, self._files).get("model_type")
        return next((kind for kind, models in _USUAL.items() if model in models), None)

    @cached_property
    def rate(self) -> int:
        """The sampling rate that the model takes, in samples per second: the file's, or that of its class."""
        told = self.config.get("sampling_rate")
        if told is None and self.kind not in _USUAL:
            told = getattr(self._transformers_processor, "sampling_rate", None)
        return int(told or 16000)

    @cached_property
    def _transformers_processor(self) -> Any:
        return _from_transformers("AutoFeatureExtractor", self.kind, self._files)

    @cached_property
    def longest(self) -> int | None:
        """The most samples that the model takes, where there is a limit; transformers would drop the rest."""
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

    @property
    def hears_long(self) -> bool:
        """Whether `spectrogram` makes one of sounds longer than `longest`."""
        return self.kind == "WhisperFeatureExtractor"

    def spectrogram(self, sound: Array) -> Spectrogram:
        """Whisper's log-mel spectrogram of a sound of any length, computed window by window as it is heard."""
        return self._log_mel.long_spectrogram(sound)

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
            return self._pad_sounds(sounds)
        with _library_errors(f"transformers' {self.kind} does not prepare these sounds", InputError, str(self.kind)):
            whole = {"truncation": False} if _truncates_by_default(self._transformers_processor) else {}
            found = self._transformers_processor(sounds, sampling_rate=self.rate, return_tensors="np", **whole)
            return {name: np.asarray(value) for name, value in found.items()}

    @cached_property
    def _log_mel(self) -> LogMel:
        try:
            return msgspec.convert(self._settings, LogMel)
        except msgspec.ValidationError as error:
            raise FormatError(f"{self.path / 'preprocessor_config.json'}: {error}.") from error

    def _pad_sounds(self, sounds: list[Array]) -> dict[str, Array]:
        width = max(map(len, sounds))
        values = np.zeros((len(sounds), width), np.float32)
        mask = np.zeros((len(sounds), width), np.int64)
        for index, sound in enumerate(sounds):
            values[index, : len(sound)] = _normalize_sound(sound) if self._settings.get("do_normalize", True) else sound
            mask[index, : len(sound)] = 1
        return {"input_values": values, "attention_mask": mask}

    def open_sound(self, given: Any) -> Array:
        """Open a sound as float32 [samples]: a .wav file, an array, or {"raw" or "array": array, "sampling_rate": n}.

        Raises InputError for anything else, and for another sampling rate.
        """
        rate = self.rate
        if isinstance(given, dict) and given.get("stride") is not None:
            raise InputError(
                f"stride={given['stride']!r:.80} of a sound, whose ends other pieces hear too, is not done here. "
                f"Give the sound without it."
            )
        if isinstance(given, dict) and "sampling_rate" in given and given.keys() & {"raw", "array"}:
            given, rate = given.get("raw", given.get("array")), given["sampling_rate"]
        elif isinstance(given, str | Path):
            given, rate = read_wave(Path(given), self.rate)
        samples = as_samples(to_numpy(given))
        if rate != self.rate:
            raise InputError(
                f"The sound has {rate} samples per second; the model takes {self.rate}. Resample it: "
                f"ffmpeg -i FILE -ac 1 -ar {self.rate} sound.wav, or torchaudio.functional.resample of an array."
            )
        return samples


def _truncates_by_default(extractor: Any) -> bool:
    """Whether an extractor of transformers truncates long sounds by default."""
    told = inspect.signature(extractor.__call__).parameters.get("truncation")
    return told is not None and told.default is True


def _normalize_sound(sound: Array) -> Array:
    """Scale a sound to mean 0 and variance 1, as wav2vec 2.0 was trained."""
    result: Array = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    return result


def _read_settings(path: Path, files: Readable, what: str, *parts: str) -> dict[str, Any]:
    """Read the settings for images or sounds: a part of processor_config.json, else preprocessor_config.json."""
    name = str(path / "processor_config.json")
    whole = parse_object(files.get("processor_config.json") or b"{}", name)
    part = next((whole[each] for each in parts if each in whole), None)
    if part is not None:
        if not isinstance(part, dict):
            raise FormatError(f"{name} says of {what} {part!r:.40}, not an object.")
        return part
    data = files.get("preprocessor_config.json")
    if data is None:
        raise ArtifactError(
            f"{path} has no preprocessor_config.json: its checkpoint does not say how {what} are prepared. Call the "
            f"model with arrays instead."
        )
    return parse_object(data, str(path / "preprocessor_config.json"))


def _model_config(path: Path, files: Readable) -> dict[str, Any]:
    return parse_object(files.get("config.json") or b"{}", str(path / "config.json"))


def _image_class(settings: dict[str, Any], model: dict[str, Any]) -> Any:
    """The class that the files name, where transformers looks for it; None where none does."""
    named, code = settings.get("image_processor_type"), settings.get("auto_map")
    if named is None and not (isinstance(code, dict) and "AutoImageProcessor" in code):
        # Files from before transformers 4.27 call it a feature extractor.
        old = settings.get("feature_extractor_type")
        named = old.replace("FeatureExtractor", "ImageProcessor") if isinstance(old, str) else old
    return named if named is not None else model.get("image_processor_type")


def _from_transformers(name: str, kind: Any, files: Readable) -> Any:
    """transformers' own processor. Raises UsageError where it is not installed, ArtifactError where it refuses."""
    kind = kind or "which names no class"
    what = f"transformers makes no processor of preprocessor_config.json, {kind}"
    with _library_errors(what, ArtifactError, str(kind)), write_processor_files(files) as path:
        return getattr(import_module("transformers"), name).from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )


@contextmanager
def _library_errors(what: str, kind: type[PrecastError], theirs: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises within into a `kind`, and a missing package, which transformers' processor
    `theirs` may notice at any time, into a UsageError."""
    try:
        yield
    except (MemoryError, PrecastError):
        raise
    except ImportError as error:
        lacking = " ".join(str(error).split())
        raise UsageError(
            f"{theirs} is prepared by transformers, which is not installed or lacks something: {lacking}. "
            f"pip install 'precast[export]', and what else is named"
        ) from error
    except Exception as error:
        # transformers meets broken settings, and those that need code of their own, with errors of any type.
        said = " ".join(str(error).split())
        raise kind(f"{what}: {type(error).__name__}: {said:.300}") from error
