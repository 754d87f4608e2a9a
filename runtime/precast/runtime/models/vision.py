"""Encoders of images, and of images and texts together.

Images have the compiled size: none is resized or padded here. A checkpoint's own processor does that as it was trained.
"""

from __future__ import annotations

from .encoder_base import Encoder

__all__ = [
    "CompiledModelForImageClassification",
    "CompiledModelForObjectDetection",
    "CompiledModelForSemanticSegmentation",
    "CompiledModelForZeroShotImageClassification",
]


class CompiledModelForImageClassification(Encoder):
    """`.logits` [batch, labels]."""

    task = "image-classification"


class CompiledModelForSemanticSegmentation(Encoder):
    """`.logits` [batch, labels, height, width], of the size that the model makes, for many a quarter of the image's."""

    task = "semantic-segmentation"


class CompiledModelForObjectDetection(Encoder):
    """`.logits` [batch, queries, labels and "no object"] and `.pred_boxes` [batch, queries, 4]: centre x and y, width
    and height as shares of the image."""

    task = "object-detection"


class CompiledModelForZeroShotImageClassification(Encoder):
    """`.logits_per_image` [batch, texts], `.image_embeds` [batch, dim] and `.text_embeds` [texts, dim]."""

    task = "zero-shot-image-classification"
