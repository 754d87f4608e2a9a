"""Published files about images give transformers' pixels: any class, any settings, any kind of image.

Compared with the classes of transformers that use Pillow, `…ImageProcessorPil`, wherever there are two.
"""

from __future__ import annotations

import base64
import json
import random
import re

import corpus
import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from precast.runtime.errors import FormatError, InputError, PrecastError, UsageError
from precast.runtime.pipelines.image_processing import CLASSES, TYPES
from precast.runtime.pipelines.processors import ImageProcessor, open_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 52, 3), np.uint8))
EVERY = sorted({names["pil"].removesuffix("Pil") for names in IMAGE_PROCESSOR_MAPPING_NAMES.values() if "pil" in names})
SWITCH = (True, True, False, None)
KEYS = {
    "do_resize": SWITCH, "do_rescale": SWITCH, "do_normalize": SWITCH, "do_convert_rgb": SWITCH,
    "do_center_crop": SWITCH, "do_pad": (None, None, True, False), "default_to_square": SWITCH,
    "size": (
        24, 31, {"height": 24, "width": 35}, {"shortest_edge": 24}, {"shortest_edge": 24, "longest_edge": 30}, [24, 35],
        {"longest_edge": 40}, {"max_height": 30, "max_width": 41}, [24], "24", {"height": 24, "width": None}, 0, None,
    ),
    "crop_size": (16, {"height": 16, "width": 21}, [16, 60], {"shortest_edge": 9}, {"height": -1, "width": -1}, None),
    "pad_size": (None, None, {"height": 60, "width": 70}, 64),
    "resample": (0, 1, 2, 3, 4, 5, None, 7, "3"), "rescale_factor": (1 / 255, 1 / 127.5, 1, None, "x"),
    "image_mean": ([0.4, 0.5, 0.6], [0.4, 0.5, 0.6], 0.5, [0, 1, 0], [0.5], None),
    "image_std": ([0.2, 0.3, 0.4], [0.2, 0.3, 0.4], 0.5, [1, 1, 1], "wide", None),
    "data_format": ("channels_first", "channels_last", None), "device": ("cpu", None),
    "input_data_format": ("channels_first", "channels_last", None, "NCHW"), "return_tensors": ("np", "pt", None),
    "disable_grouping": SWITCH, "image_seq_length": (7, None),
    # Of single classes, or of none.
    "do_reduce_labels": SWITCH, "reduce_labels": SWITCH, "use_square_size": (False, True, None), "crop_pct": (0.9, 0.5),
    "do_flip_channel_order": SWITCH, "include_top": SWITCH, "rescale_offset": SWITCH, "size_divisor": (32, 8),
    "do_thumbnail": SWITCH, "do_align_long_axis": SWITCH, "max_size": (40, None), "apply_ocr": (False,),
    "keep_aspect_ratio": SWITCH, "ensure_multiple_of": (1, 8), "patch_size": (14, 8), "image_size": (24,),
    "feature_extractor_type": ("CLIPFeatureExtractor", None), "processor_class": ("CLIPProcessor",), "augment": (True,),
    "_valid_processor_keys": (["images"],), "auto_map": ({"AutoImageProcessor": "own.Own"}, {"AutoProcessor": "own.A"}),
}  # fmt: skip
"""Every key of transformers' ImagesKwargs, and others that files have, with values that they have or should not."""


def write(path, settings, **config):
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps(config))
    return path


def theirs(path, images=(PICTURE,)):
    """What models see of images by transformers, or what it says instead."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        found = processor(images=list(images), return_tensors="np")
        return {name: np.asarray(value) for name, value in found.items() if name.startswith("pixel")}
    except Exception as error:
        return error


def same(path, images=(PICTURE,)) -> bool:
    """Whether there are pixels; they are transformers', and where it has none there is a typed error."""
    expected = theirs(path, images)
    if isinstance(expected, Exception):
        with pytest.raises(PrecastError):
            ImageProcessor(path)(list(images))
        return False
    found = ImageProcessor(path)(list(images))
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert np.allclose(found[name], value, rtol=1e-5, atol=1e-5, equal_nan=True), name
    return True


def drawn(draw: random.Random, kind: str) -> dict[str, object]:
    names = draw.sample(sorted(KEYS), draw.randrange(3, 12))
    return {"image_processor_type": kind, **{name: draw.choice(KEYS[name]) for name in names}}


def test_the_keys_are_transformers():
    assert transformers.processing_utils.ImagesKwargs.__annotations__.keys() <= KEYS.keys()


def test_classes_and_types_are_transformers():
    for kind, types in TYPES.items():
        name = f"{kind}ImageProcessorPil"
        assert sorted(types) == sorted(
            each for each, names in IMAGE_PROCESSOR_MAPPING_NAMES.items() if names.get("pil") == name
        )
        theirs, ours = getattr(transformers, name), CLASSES[kind]
        for key in ("size", "crop_size", "resample", "image_mean", "image_std", "do_center_crop", "default_to_square"):
            usual = {"do_center_crop": False, "default_to_square": True}.get(key)
            assert (getattr(theirs, key, None) or False) == (ours.get(key, usual) or False), (kind, key)
        assert [theirs.do_resize, theirs.do_rescale, theirs.do_normalize] == [True] * 3


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_what_a_file_leaves_out_is_its_class_or_its_models(tmp_path, kind):
    for settings in (
        {"image_processor_type": f"{kind}ImageProcessor"},
        {"feature_extractor_type": f"{kind}FeatureExtractor"},
        {"image_processor_type": f"{kind}ImageProcessorFast", "do_resize": None, "crop_size": 30},
    ):
        assert same(write(tmp_path, settings))
    for model_type in TYPES[kind]:
        assert ImageProcessor(write(tmp_path, {"size": 30}, model_type=model_type))._rules is not None
    assert same(write(tmp_path, {"size": 30}, model_type=TYPES[kind][0]))


@pytest.mark.parametrize("size", [20, {"shortest_edge": 31}, 383, 384, 400])
def test_convnext_crops_below_384_and_warps_from_there_on(tmp_path, size):
    for settings in ({"size": size}, {"size": size, "crop_pct": 0.95, "do_center_crop": True, "crop_size": 16}):
        path = write(tmp_path, {"image_processor_type": "ConvNextImageProcessor", **settings})
        assert ImageProcessor(path)._rules is not None
        assert same(path)


def test_segformer_reads_a_crop_and_does_none(tmp_path):
    assert same(
        write(tmp_path, {"image_processor_type": "SegformerImageProcessor", "do_center_crop": True, "crop_size": 9})
    )


def test_old_names_of_classes_are_theirs(tmp_path):
    """transformers 4 wrote them; 5 does not know them any more."""
    image = ImageProcessor(write(tmp_path, {"image_processor_type": "CLIPImageProcessor", "size": 30}))([PICTURE])
    write(tmp_path, {"image_processor_type": "CLIPFeatureExtractor", "size": 30}, model_type="vit")
    assert isinstance(theirs(tmp_path), ValueError)
    assert np.array_equal(ImageProcessor(tmp_path)([PICTURE])["pixel_values"], image["pixel_values"])


def test_any_settings_of_a_file_are_obeyed_or_refused(tmp_path):
    draw = random.Random(0)
    done = [same(write(tmp_path, drawn(draw, f"{draw.choice(sorted(CLASSES))}ImageProcessor"))) for _ in range(100)]
    assert 25 < sum(done) < 90


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.filterwarnings("ignore")
def test_any_settings_of_every_class_are_obeyed_or_refused(tmp_path, kind):
    draw = random.Random(kind)
    for index in range(40):
        settings = drawn(draw, kind) if index else {"image_processor_type": kind}
        same(write(tmp_path, settings), (PICTURE,) if index % 2 else (PICTURE, PICTURE.resize((40, 40))))


@pytest.mark.slow
@corpus.needs_corpus
@corpus.each_processor
@pytest.mark.filterwarnings("ignore")
def test_what_people_publish_is_prepared_as_by_transformers_or_refused(tmp_path, folder):
    corpus.copy_processor(folder, tmp_path)
    file = folder / "preprocessor_config.json"
    rules = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if str(rules.get("image_processor_type")).endswith("FeatureExtractor"):
        assert ImageProcessor(tmp_path)([PICTURE])["pixel_values"].any(), "a name that transformers 5 has no more"
    else:
        same(tmp_path)


def test_what_is_not_installed_is_said_when_it_is_missed(tmp_path, monkeypatch):
    """Owlv2's needs scipy, and notices as it is called."""
    path = write(tmp_path, {"image_processor_type": "Owlv2ImageProcessor"})

    def lacking(self, *images, **rules):
        raise ImportError("\nOwlv2 requires the scipy library\n")

    monkeypatch.setattr(transformers.Owlv2ImageProcessorPil, "__call__", lacking)
    with pytest.raises(
        UsageError, match=r"Owlv2ImageProcessor is prepared by transformers, which .* scipy library\. pip"
    ):
        ImageProcessor(path)([PICTURE])


def test_the_part_of_processor_config_counts(tmp_path):
    write(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 20})
    whole = tmp_path / "processor_config.json"
    for part in ({"image_processor_type": "CLIPImageProcessor", "crop_size": 24}, None):
        whole.write_text(json.dumps({"processor_class": "AProcessor", "image_processor": part}))
        assert same(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    whole.write_text(json.dumps({"image_processor": {"image_processor_type": "LevitImageProcessor", "size": 30}}))
    assert same(tmp_path), "transformers is given the file"
    whole.write_text(json.dumps({"image_processor": "clip"}))
    with pytest.raises(FormatError, match=r"processor_config.json says of images 'clip', not an object"):
        ImageProcessor(tmp_path)


COLOURS = np.random.default_rng(1).integers(0, 256, (9, 14, 3))


@pytest.mark.parametrize(
    "array",
    [
        COLOURS.astype(np.uint8), COLOURS, COLOURS.astype(np.float32), COLOURS.astype(np.float16),
        COLOURS.astype(">u2"), COLOURS.transpose(2, 0, 1), COLOURS[..., :1], COLOURS[None, ..., 0], COLOURS[:3],
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)  # fmt: skip
def test_arrays_are_what_transformers_takes_them_for(tmp_path, array):
    path = write(tmp_path, {"image_processor_type": "CLIPImageProcessor"})
    found = ImageProcessor(path)([open_image(array)])["pixel_values"]
    assert np.abs(found - theirs(path, [array])["pixel_values"]).max() < 1e-5


def test_a_file_says_where_arrays_have_their_channels(tmp_path):
    path = write(tmp_path, {"image_processor_type": "ViTImageProcessor", "input_data_format": "channels_last"})
    processor = ImageProcessor(path)
    found = processor([open_image(COLOURS[:3], processor.layout)])["pixel_values"]
    assert np.abs(found - theirs(path, [COLOURS[:3].astype(np.uint8)])["pixel_values"]).max() < 1e-5
    with pytest.raises(InputError, match=r"array of 3x9x14 .* channels_last as its file says"):
        open_image(COLOURS.transpose(2, 0, 1), processor.layout)


def test_pictures_lie_as_their_file_says(tmp_path):
    """As transformers' pipelines open them."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        PICTURE.save(tmp_path / "a.jpg", exif=exif)
        expected = transformers.image_utils.load_image(str(tmp_path / "a.jpg"))
        for given in (str(tmp_path / "a.jpg"), tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")):
            assert np.array_equal(open_image(given), expected)
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"):
        image = PICTURE.convert("L").convert("I").convert(mode) if mode == "I;16" else PICTURE.convert(mode)
        assert np.array_equal(open_image(image), transformers.image_utils.load_image(image)), mode


def test_pictures_come_as_base64_too(tmp_path):
    file = tmp_path / "a.png"
    PICTURE.save(file)
    plain = base64.b64encode(file.read_bytes()).decode()
    for given in (plain, f"data:image/png;base64,{plain}", base64.encodebytes(file.read_bytes()).decode()):
        assert np.array_equal(open_image(given), transformers.image_utils.load_image(given))
    with pytest.raises(
        InputError, match=r"^data:image/png;base64,iVBOR\S{30,40}… cannot be read as an image: \S{0,90}"
    ):
        open_image(f"data:image/png;base64,{plain[:400]}")
    with pytest.raises(InputError, match=r"nothing\.png cannot be read as an image: FileNotFoundError"):
        open_image(str(tmp_path / "nothing.png"))
    with pytest.raises(InputError, match=r"https://a.b/c.png is an address, and .* Download it yourself"):
        open_image("https://a.b/c.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (COLOURS / 255, r"array of float64 with values from 0\S* to 1, but .*\(image \* 255\).round\(\)"),
        (-COLOURS, r"array of int64 with values from -\d+ to"),
        (COLOURS * 256, r"values from \d+ to 6\d+,"),
        (np.full((4, 4, 3), np.nan), "values from nan to nan"),
        (COLOURS[..., 0] > 3, "array of bool"),
        (COLOURS.astype(str), "array of <U"),
        (np.zeros((0, 5, 3)), "array of 0x5x3 values, so there is nothing to see"),
        (np.zeros((2, 9, 14, 3)), "array of 2x9x14x3 values: give"),
        (np.zeros((9, 14, 4)), "array of 9x14x4 values: give"),
        (np.zeros(9), "array of 9 values: give"),
        (Image.new("RGB", (0, 4)), "has 4x0 pixels"),
        ([1], "An image is a file"),
    ],
)
def test_what_is_no_image_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        open_image(given)


def test_broken_pictures_are_refused_by_name(tmp_path, monkeypatch):
    place = tmp_path / "a.png"
    PICTURE.save(place)
    whole = place.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:40] + b"\0" * 200 + whole[240:], b"", b"GIF89a"):
        place.write_bytes(damaged)
        with pytest.raises(InputError, match=re.escape(f"{place} cannot be read as an image")):
            open_image(place)
    place.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"a.png cannot be read as an image: DecompressionBombError"):
        open_image(place)
