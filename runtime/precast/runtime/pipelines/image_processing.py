"""The plain image processors of transformers: resize, crop, rescale, normalize, by their classes' defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

__all__ = ["CLASSES", "TYPES", "ImageRules", "find_class", "read_rules"]

Array = np.ndarray[Any, Any]

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_EVEN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_BILINEAR, _BICUBIC = {"resample": 2}, {"resample": 3}
_CROPPED = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}


def _square_size(side: int) -> dict[str, dict[str, int]]:
    return {"size": {"height": side, "width": side}}


_CLIP = {**_OPENAI, **_BICUBIC, **_CROPPED, "size": {"shortest_edge": 224}, "default_to_square": False}

CLASSES: dict[str, dict[str, Any]] = {
    "Beit": {**_EVEN, **_BICUBIC, **_square_size(224), "crop_size": {"height": 224, "width": 224}},
    "Bit": _CLIP,
    "Blip": {**_OPENAI, **_BICUBIC, **_square_size(384)},
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "ConvNext": {
        **_EVEN, **_BICUBIC, "size": {"shortest_edge": 384}, "default_to_square": False, "crop_pct": 224 / 256,
    },
    "DeiT": {**_EVEN, **_BICUBIC, **_CROPPED, **_square_size(256)},
    "MobileNetV1": {
        **_EVEN, **_BILINEAR, **_CROPPED, "size": {"shortest_edge": 256}, "default_to_square": False,
    },
    "Pvt": {**_IMAGENET, **_BICUBIC, **_square_size(224)},
    "Segformer": {**_IMAGENET, **_BILINEAR, **_square_size(512)},
    "Siglip": {**_EVEN, **_BICUBIC, **_square_size(224), "default_to_square": False},
    "ViT": {**_EVEN, **_BILINEAR, **_square_size(224)},
}  # fmt: skip
"""The defaults of the classes `…ImageProcessor` whose steps are these, where they differ from those of ImageRules."""

TYPES = {
    "Beit": ("beit", "data2vec-vision"),
    "Bit": ("bit", "dinov2", "focalnet", "hiera", "pixio"),
    "Blip": ("blip", "blip-2", "instructblip"),
    "CLIP": (
        "aimv2", "aimv2_vision_model", "altclip", "clip", "florence2", "git", "groupvit", "kosmos-2", "metaclip_2",
        "mlcd", "vipllava", "xclip",
    ),
    "ChineseCLIP": ("chinese_clip",),
    "ConvNext": ("convnext", "convnextv2", "cvt", "regnet", "resnet"),
    "DeiT": ("deit",),
    "MobileNetV1": ("mobilenet_v1",),
    "Pvt": ("pvt", "pvt_v2"),
    "Segformer": ("segformer", "upernet"),
    "Siglip": ("colpali", "gemma3n", "paligemma", "siglip"),
    "ViT": (
        "clipseg", "dinat", "ijepa", "mgp-str", "swiftformer", "swin", "swinv2", "trocr", "vit", "vit_mae", "vit_msn",
    ),
}  # fmt: skip
"""The model types whose class each is where a file names none."""

_CLASS_OF_TYPE = {each: kind for kind, types in TYPES.items() for each in types}

_Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
# No tuple[_Side, _Side]: msgspec 0.22 crashes on its union with a dictionary.
_Size = _Side | Annotated[list[_Side], msgspec.Meta(min_length=2, max_length=2)] | dict[str, _Side]
_PerChannel = float | Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)]


class ImageRules(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of a preprocessor_config.json that these classes obey, and what they do to an image.

    Any other key changes nothing, neither here nor in transformers; null switches a step off. A size is one number,
    [height, width], or a dictionary of either; of one number `default_to_square` says whether it is a square's side or
    the shorter edge.
    """

    size: _Size
    crop_size: _Size | None = None
    default_to_square: bool | None = True
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)]
    rescale_factor: float = 1 / 255
    image_mean: _PerChannel
    image_std: _PerChannel
    do_resize: bool | None = True
    do_center_crop: bool | None = False
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    input_data_format: Literal["channels_first", "channels_last"] | None = None
    # Of ConvNeXT alone.
    crop_pct: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    # Transformers alone does these.
    do_pad: bool | None = False
    use_square_size: bool | None = False

    def __post_init__(self) -> None:
        if self.do_pad or self.use_square_size:
            raise ValueError("a step that is not done here")
        if tuple(sorted(self.resized)) not in (("height", "width"), ("shortest_edge",)):
            raise ValueError(f"no rule for the size {self.size}")
        if self.crop_size is not None and sorted(_edge_lengths(self.crop_size)) != ["height", "width"]:
            raise ValueError(f"no rule for the crop size {self.crop_size}")
        if self.do_center_crop and self.crop_size is None:
            raise ValueError("cropped to no size")

    @property
    def resized(self) -> dict[str, int]:
        """The target of resizing: height and width, or shortest_edge."""
        is_edge = isinstance(self.size, int) and not self.default_to_square
        return _edge_lengths(self.size, ("shortest_edge",) if is_edge else ("height", "width"))

    def _resize_image(self, image: Any) -> Array:
        """uint8 [height, width, 3]. ConvNeXT's are squares: small ones the middle of a larger image, others warped."""
        if self.crop_pct is None:
            return np.asarray(image.resize(_target_size(image.size, self.resized), self.resample))
        side = self.resized["shortest_edge"]
        if side >= _WARPED:
            return np.asarray(image.resize((side, side), self.resample))
        larger = _target_size(image.size, {"shortest_edge": int(side / self.crop_pct)})
        return _crop_center(np.asarray(image.resize(larger, self.resample)), _edge_lengths(side))

    def pixels(self, image: Any) -> Array:
        """float32 [3, height, width] of a Pillow image in colours."""
        pixels = self._resize_image(image) if self.do_resize else np.asarray(image)
        if self.do_center_crop and self.crop_size is not None:
            pixels = _crop_center(pixels, _edge_lengths(self.crop_size))
        values = pixels.transpose(2, 0, 1)
        if self.do_rescale:
            values = values.astype(np.float64) * self.rescale_factor
        values = values.astype(np.float32)
        if self.do_normalize:
            mean, deviation = (
                np.array(each, np.float32).reshape(-1, 1, 1) for each in (self.image_mean, self.image_std)
            )
            values = (values - mean) / deviation
        return values.astype(np.float32)


_WARPED = 384
"""The side from which on ConvNeXT cuts nothing off."""
_UNCROPPED = ("Segformer",)
"""Classes that read do_center_crop and crop nothing."""
# transformers 4 wrote the name of the class that was used, old ones, which 5 has no more, and fast ones among them.
_NAME = re.compile("(.*)(ImageProcessor(Pil)?|FeatureExtractor)(Fast)?")


def read_rules(kind: str, settings: Mapping[str, Any]) -> ImageRules | None:
    """The rules of the class `kind` with a file's `settings`; None where only transformers knows them."""
    is_convnext = kind == "ConvNext"
    heeded = settings if is_convnext else {name: settings[name] for name in settings if name != "crop_pct"}
    try:
        rules = msgspec.convert({**CLASSES[kind], **heeded}, ImageRules)
    except msgspec.ValidationError:
        return None
    if is_convnext and (rules.crop_pct is None or "shortest_edge" not in rules.resized):
        return None
    return msgspec.structs.replace(rules, do_center_crop=False) if kind in _UNCROPPED else rules


def find_class(named: Any, model_type: Any) -> str | None:
    """The class of CLASSES that a file names, or that its model type implies where `named` is None; None for others."""
    if named is None:
        return _CLASS_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    found = _NAME.fullmatch(named) if isinstance(named, str) else None
    return found[1] if found and found[1] in CLASSES else None


def _edge_lengths(size: Any, one: tuple[str, ...] = ("height", "width")) -> dict[str, int]:
    if isinstance(size, int):
        return dict.fromkeys(one, size)
    return size if isinstance(size, dict) else dict(zip(("height", "width"), size, strict=True))


def _target_size(size: tuple[int, int], asked: dict[str, int]) -> tuple[int, int]:
    """(width, height) of the resized image."""
    if "shortest_edge" not in asked:
        return asked["width"], asked["height"]
    short, long = sorted(size)
    edge = asked["shortest_edge"]
    longer = int(edge * long / short)
    return (edge, longer) if size[0] <= size[1] else (longer, edge)


def _crop_center(pixels: Array, asked: dict[str, int]) -> Array:
    """Crop the middle of an image [height, width, channels], padded with black where it is smaller."""
    for axis, size in enumerate((asked["height"], asked["width"])):
        missing = max(0, size - pixels.shape[axis])
        before = -(-missing // 2)
        pads = [(before, missing - before) if each == axis else (0, 0) for each in range(3)]
        pixels = np.pad(pixels, pads)
        start = (pixels.shape[axis] - size) // 2
        pixels = pixels.take(range(start, start + size), axis)
    return pixels
