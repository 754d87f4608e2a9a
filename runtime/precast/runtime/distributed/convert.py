"""Weights of an artifact for several ranks, divided into more or fewer files: nothing is compiled or computed."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from msgspec.structs import replace

from ..artifact import Artifact, read_artifact
from ..artifact.integrity import require_trust, vouch
from ..artifact.publish import check_target, copy_file, hash_files, publish, staging, write_config
from ..artifact.ranks import split_of, storage_rule
from ..artifact.schema import Ranks, Variant
from ..artifact.weight_files import WEIGHTS, WeightFile, divide_weights, join_weights, rank_file
from ..errors import UsageError

__all__ = ["convert", "join", "split"]


def split(
    artifact: str | Path, ranks: int, target: str | Path, *, force: bool = False, sha256: str | None = None,
    trust_native_code: bool = False,
) -> Artifact:  # fmt: skip
    """Divide the weights of an artifact for several ranks into a file for each of `ranks`, in a copy of it at `target`.
    It runs where they are as many as it was compiled for.

    Args:
        force: replace an existing artifact at the target.
        sha256, trust_native_code: proof of the artifact's native code, as of `from_pretrained`; the copy is trusted
            then, as it is.

    Raises:
        UsageError: the artifact is for one rank, or its weights cannot be divided so.
        ArtifactError: it is damaged, or holds native code without proof.
        PublishError: the target cannot be written.
    """
    if type(ranks) is not int or ranks < 1:
        raise UsageError(f"ranks must be a whole number from 1, not {ranks!r:.80}.")
    return convert(artifact, ranks, target, force=force, sha256=sha256, trust_native_code=trust_native_code)


def join(
    artifact: str | Path, target: str | Path, *, force: bool = False, sha256: str | None = None,
    trust_native_code: bool = False,
) -> Artifact:  # fmt: skip
    """Put the weights of all ranks into one file, of which each rank reads its parts; arguments and errors are those of
    `split`."""
    return convert(artifact, 1, target, force=force, sha256=sha256, trust_native_code=trust_native_code)


def convert(
    artifact: str | Path, parts: int, target: str | Path, *, force: bool, sha256: str | None, trust_native_code: bool
) -> Artifact:
    """`split`, or `join` where `parts` is 1."""
    old, target = read_artifact(artifact), Path(target)
    old.contents.verify()
    require_trust(str(old.path), old.contract.digest, sha256=sha256, trust_native_code=trust_native_code)
    if not any(variant.ranks for variant in old.contract.variants):
        if any(variant.stages for variant in old.contract.variants):
            raise UsageError(f"{old.path} has whole layers in each of its stages, and no weights that are divided.")
        raise UsageError(
            f"{old.path} is compiled for one rank, whose weights are not divided: precast export … --tensor-parallel "
            f"{max(2, parts)} compiles for several."
        )
    check_target(target, force=force)
    with staging(target) as stage:
        divided = {name for variant in old.contract.variants if variant.ranks for name in variant.weights}
        for name in (name for name in old.contract.files if name not in divided):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(old, name, stage / name)
        variants = [_convert_variant(old, each, parts, stage) if each.ranks else each for each in old.contract.variants]
        made = write_config(stage, old.config, replace(old.contract, variants=variants, files=hash_files(stage)))
        for name in ("README.md",):
            if (old.path / name).is_file():
                (stage / name).write_bytes((old.path / name).read_bytes())
        publish(stage, target, force=force)
        vouch(made.contract.digest)
    return read_artifact(target)


def _convert_variant(old: Artifact, variant: Variant, parts: int, stage: Path) -> Variant:
    """Write the weights of a variant into the stage, in so many parts."""
    assert variant.ranks, "of several ranks"
    folder = PurePosixPath(next(name for name in variant.weights if "rank_" not in name)).parent
    held = {name: WeightFile.read(old.path / name) for name in variant.weights}
    shared = held.pop(str(folder / WEIGHTS))
    whole = join_weights(shared, list(held.values()), storage_rule(variant.ranks)) if held else shared
    new = replace(variant.ranks, stored=parts)
    if parts == 1:
        whole.write(_place(stage, folder / WEIGHTS))
        return replace(variant, ranks=new, weights=[str(folder / WEIGHTS)])
    _check_divides(whole, new)
    common, own = divide_weights(whole, storage_rule(new))
    names = [str(folder / WEIGHTS), *(str(folder / rank_file(rank)) for rank in range(parts))]
    for name, part in zip(names, [common, *own], strict=True):
        part.write(_place(stage, PurePosixPath(name)))
    return replace(variant, ranks=new, weights=names)


def _check_divides(whole: WeightFile, ranks: Ranks) -> None:
    rule = storage_rule(ranks)
    for name, tensor in whole.tensors.items():
        split = split_of(rule, name)
        if split and tensor.shape[split.dim] % (split.blocks * (rule.count // split.copies)):
            raise UsageError(
                f"{name} has {tensor.shape[split.dim]} rows or columns, which {ranks.stored} ranks cannot share "
                f"equally. This artifact is compiled for {ranks.count}."
            )


def _place(stage: Path, name: PurePosixPath) -> Path:
    place = stage / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place
