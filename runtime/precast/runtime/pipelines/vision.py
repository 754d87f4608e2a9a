"""Pipelines of images: classification, segmentation, object detection, features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from ..generation.probabilities import sigmoid, softmax
from .base import Array, Batch, Pipeline
from .choices import LabelledPipeline, fill_template, labels_of
from .processors import ImageProcessor, interpolate, open_image
from .scores import classify_row, label, top_indices

__all__ = [
    "ImageClassificationPipeline",
    "ImageFeatureExtractionPipeline",
    "ImageSegmentationPipeline",
    "ObjectDetectionPipeline",
    "ZeroShotImageClassificationPipeline",
]

# Which families score every label by itself, and which know "no object" as their last label.
_INDEPENDENT = ("conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine")
_WITH_NONE = ("detr", "yolos", "table-transformer")


class _ImagePipeline(Pipeline):
    names = ("images", "image")
    parts: ClassVar[tuple[str, ...]] = ("image_processor",)

    @cached_property
    def processor(self) -> ImageProcessor:
        """The checkpoint's image processor."""
        return ImageProcessor(*self._part_files("image_processor"))

    def preprocess(self, inputs: Any) -> Batch:
        """Images as `pixel_values` float32 [images, channels, height, width].

        Args:
            inputs: a file, base64 (data:image/png;base64,…), a Pillow image, or an array of whole numbers from 0 to
                255, [height, width, channels], [channels, height, width] or [height, width], with one or three
                channels; or a list of these.
        """
        given, is_one = self._as_list(inputs)
        images = [open_image(each, self.processor.layout) for each in given]
        return Batch(self._as_arrays(images), given, is_one, sizes=[(image.height, image.width) for image in images])

    def _as_arrays(self, images: list[Any]) -> dict[str, Array]:
        return {name: rows for name, rows in self.processor(images).items() if name in self.model.inputs}


class ImageClassificationPipeline(_ImagePipeline):
    """Labels of images."""

    def postprocess(self, outputs: Batch, *, top_k: int | None = 5, function_to_apply: str | None = None) -> Any:
        """[{"label", "score"}, …] for each image, the likeliest first; options as for text-classification."""
        rows = [classify_row(self.model.config, row, function_to_apply)[:top_k] for row in outputs["logits"]]
        return outputs.answer(rows)


class ImageFeatureExtractionPipeline(_ImagePipeline):
    """Vectors of images."""

    def postprocess(self, outputs: Batch) -> Any:
        """Every patch's vector, [1, patches, hidden] or as the model has them, as nested lists."""
        return outputs.answer([states[None].tolist() for states in outputs["last_hidden_state"]])


class ImageSegmentationPipeline(_ImagePipeline):
    """Segmentation: the label of each pixel."""

    def postprocess(self, outputs: Batch) -> Any:
        """[{"score": None, "label", "mask"}, …] for each image: a Pillow image of its size, 255 where the label is."""
        pillow = import_module("PIL.Image")
        answers = []
        for logits, size in zip(outputs["logits"], outputs.notes["sizes"], strict=True):
            classes = interpolate(logits, *size).argmax(0)
            masks = {
                int(index): pillow.fromarray((classes == index).astype(np.uint8) * 255) for index in np.unique(classes)
            }
            answers.append(
                [
                    {"score": None, "label": label(self.model.config, index), "mask": mask}
                    for index, mask in masks.items()
                ]
            )
        return outputs.answer(answers)


class ObjectDetectionPipeline(_ImagePipeline):
    """Object detection: labels with boxes."""

    def postprocess(self, outputs: Batch, *, threshold: float = 0.5) -> Any:
        """[{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}, …] for each image, in its own pixels.

        Args:
            outputs: of `forward`.
            threshold: nothing less likely is an answer.
        """
        answers = []
        for logits, boxes, size in zip(outputs["logits"], outputs["pred_boxes"], outputs.notes["sizes"], strict=True):
            scores, labels, queries = self._score_queries(logits)
            corners = _pixel_boxes(boxes[queries], size)
            answers.append(
                [
                    {"score": float(scores[at]), "label": label(self.model.config, int(labels[at])), "box": corners[at]}
                    for at in range(len(scores))
                    if scores[at] > threshold
                ]
            )
        return outputs.answer(answers)

    def _as_arrays(self, images: list[Any]) -> dict[str, Array]:
        """Resize images to the compiled size, whatever their own: boxes are shares of the image, so they still hold."""
        height, width = self.model.variant.graphs[0].inputs[0].shape[-2:]
        found = self.processor(images, size={"height": height, "width": width})
        return {name: rows for name, rows in found.items() if name in self.model.inputs}

    def _score_queries(self, logits: Array) -> tuple[Array, Array, Array]:
        """Scores, labels and the query of each candidate."""
        kind = self.model.config["model_type"]
        if kind in _WITH_NONE:
            scores = softmax(logits)[:, :-1]
            return scores.max(1), scores.argmax(1), np.arange(len(scores))
        if kind not in _INDEPENDENT:
            raise InputError(f"How {kind} scores objects is not known here; its logits are the model's own to read.")
        scores = sigmoid(logits).reshape(-1)
        chosen = np.array(top_indices(scores, 100 if "rt_detr" not in kind and kind != "d_fine" else len(logits)))
        return scores[chosen], chosen % logits.shape[1], chosen // logits.shape[1]


class ZeroShotImageClassificationPipeline(LabelledPipeline, _ImagePipeline):
    """Chooses the text that fits an image best."""

    parts = ("image_processor", "tokenizer")

    def preprocess(
        self,
        inputs: Any,
        *,
        candidate_labels: str | Sequence[str] = (),
        hypothesis_template: str = "This is a photo of {}.",
    ) -> Batch:
        """Images as `pixel_values`, and labels as token ids.

        Args:
            inputs: an image or a list of images, as for image-classification.
            candidate_labels: the labels; a string names several with commas.
            hypothesis_template: what is said with a label, {} stands for it.
        """
        labels = labels_of(candidate_labels)
        batch = super().preprocess(inputs)
        texts = [self._encoding(fill_template(hypothesis_template, name)) for name in labels]
        arrays = {name: rows for name, rows in self.tokenizer.pad(texts).items() if name in self.model.inputs}
        return Batch({**batch, **arrays}, batch.inputs, batch.is_one, labels=labels, texts=list(arrays))

    def forward(self, batch: Batch) -> Batch:
        """{"logits": [images, labels]}."""
        texts = {name: batch[name] for name in batch.notes["texts"]}
        images = {name: rows for name, rows in batch.items() if name not in texts}
        found = [self.model(**texts, **rows).logits_per_image for rows in self._batch_slices(images)]
        return batch.with_arrays({"logits": np.concatenate(found)})

    def postprocess(self, outputs: Batch) -> Any:
        """[{"score", "label"}, …] for each image, the likeliest first: softmax over the labels, sigmoid for SigLIP."""
        score = sigmoid if self._is_siglip else softmax
        names = outputs.notes["labels"]
        rows = [score(row) for row in outputs["logits"]]
        return outputs.answer(
            [[{"score": float(row[at]), "label": names[at]} for at in top_indices(row, None)] for row in rows]
        )

    @property
    def _is_siglip(self) -> bool:
        return "siglip" in str(self.model.config["model_type"])

    def _encoding(self, text: str) -> Any:
        # SigLIP was trained on texts of 64 tokens, padded ones included.
        found = self.tokenizer.encodings(text, length=64 if self._is_siglip else None)[0]
        if self._is_siglip:
            found.pad(64, pad_id=self.tokenizer.token_id("pad") or 0)
        return found


def _pixel_boxes(boxes: Array, size: tuple[int, int]) -> list[dict[str, int]]:
    """Convert boxes from centre and extent, as shares of the image, to corners in its pixels."""
    height, width = size
    middle, extent = boxes[:, :2], boxes[:, 2:]
    pixels = np.concatenate([middle - extent / 2, middle + extent / 2], 1) * np.array([width, height] * 2, np.float32)
    return [dict(zip(("xmin", "ymin", "xmax", "ymax"), map(int, row), strict=True)) for row in pixels]
