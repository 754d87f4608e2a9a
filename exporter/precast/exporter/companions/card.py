"""The model card of an artifact: README.md with the metadata that the Hub reads."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from precast.runtime.artifact import Artifact
from precast.runtime.terminal import printable

from ..checkpoint.checkpoint import Checkpoint

__all__ = ["render_card"]

_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


def render_card(artifact: Artifact, checkpoint: Checkpoint) -> str:
    """The card's text, with the licence, language and data sets of the checkpoint's own card."""
    from huggingface_hub import ModelCardData

    contract = artifact.contract
    variant = contract.variants[0]
    metadata = ModelCardData(
        library_name="precast",
        base_model=checkpoint.name if checkpoint.revision else None,
        pipeline_tag=contract.task,
        tags=["precast", "static-shapes", variant.backend, variant.dtype],
        **_inherited_metadata(checkpoint),
    )
    # Markdown: escapes for HTML would be shown as they are.
    template = Environment(  # noqa: S701
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    source = resources.files(__package__).joinpath("card.md.jinja").read_text("utf-8")
    return template.from_string(source).render(
        metadata=metadata.to_yaml(), contract=contract, variant=variant, printable=printable,
        model=printable(contract.source.model, keep=""),
    )  # fmt: skip


def _inherited_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    path = checkpoint.directory / "README.md"
    if checkpoint.gguf_file or not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except Exception:
        # Broken metadata, at which YAML raises errors of its own: there is nothing to carry over.
        return {}
    return {name: data[name] for name in _INHERITED if data.get(name)}
