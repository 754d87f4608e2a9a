"""The artifact: a directory whose `config.json` says everything. Read, checked and written here, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ArtifactError, FormatError
from . import strict_json
from .schema import FORMAT_VERSION, Contract, File, Variant

__all__ = ["UNLISTED", "Artifact", "contract_digest", "read_artifact", "render_config"]

KEY = "precast"
UNLISTED = frozenset({"config.json", "README.md", "bench.json", ".gitattributes"})
"""Files that `files` never lists: the contract itself, and what may change without changing the model."""


@dataclass(frozen=True)
class Artifact:
    """An opened directory: `config` is the checkpoint's own configuration, `contract` is what precast adds."""

    path: Path
    config: dict[str, Any]
    contract: Contract

    def variant_files(self, variant: Variant) -> dict[str, File]:
        """What this variant needs: all files but those that only other variants name."""
        foreign = {name for other in self.contract.variants if other is not variant for name in _named(other)}
        foreign -= _named(variant)
        return {name: file for name, file in self.contract.files.items() if name not in foreign}


def read_artifact(path: str | Path) -> Artifact:
    """Parse `path/config.json` and check it against the contract, without touching any other file.

    Raises ArtifactError where there is no artifact, FormatError where it breaks the contract.
    """
    path = Path(path)
    data = _read_config(path)
    config = strict_json.loads(data, str(path / "config.json"))
    if KEY not in config:
        raise ArtifactError(
            f"{path} is not a precast artifact: its config.json has no {KEY!r} key. "
            f"To make one from this checkpoint: precast export {path} -o OUT"
        )
    contract = _parse(config.pop(KEY), path)
    _check(contract, config, path)
    return Artifact(path, config, contract)


def render_config(config: dict[str, Any], contract: Contract) -> bytes:
    """The bytes of `config.json`: `config` plus the contract, with its digest filled in."""
    raw = msgspec.to_builtins(contract)
    raw["digest"] = contract_digest(config, contract)
    return strict_json.dumps({**config, KEY: raw})


def contract_digest(config: dict[str, Any], contract: Contract) -> str:
    """sha256 of config.json's canonical JSON without the digest itself."""
    raw = {key: value for key, value in msgspec.to_builtins(contract).items() if key != "digest"}
    return strict_json.canonical_digest({**config, KEY: raw})


def _read_config(path: Path) -> bytes:
    try:
        return (path / "config.json").read_bytes()
    except NotADirectoryError:
        raise ArtifactError(f"{path} is a file; a precast artifact is a directory with a config.json.") from None
    except FileNotFoundError:
        if path.exists():
            raise ArtifactError(f"{path} is not a precast artifact: it has no config.json.") from None
        raise ArtifactError(f"There is no directory {path}.") from None
    except OSError as error:
        raise ArtifactError(f"{path / 'config.json'} cannot be read: {error.strerror}.") from None


def _parse(raw: Any, path: Path) -> Contract:
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has artifact format {version}; this precast reads formats up to {FORMAT_VERSION}. "
            f"Upgrade it: pip install -U precast"
        )
    try:
        return msgspec.convert(raw, Contract)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path / 'config.json'} breaks the artifact contract at {KEY}: {error}.") from None


def _check(contract: Contract, config: dict[str, Any], path: Path) -> None:
    """What types cannot say: the digest, unique names, and that every file named is listed."""
    digest = contract_digest(config, contract)
    if digest != contract.digest:
        raise FormatError(
            f"{path / 'config.json'} was altered: its digest is {digest[:12]}… where it says "
            f"{contract.digest[:12]}…. Export or download the artifact again."
        )
    if contract.format_version < 1:
        raise FormatError(f"{path / 'config.json'}: there is no artifact format {contract.format_version}.")
    names = [variant.name for variant in contract.variants]
    if len(set(names)) != len(names):
        raise FormatError(f"{path / 'config.json'} names two variants alike: {', '.join(names)}.")
    for variant in contract.variants:
        if missing := sorted(_named(variant) - set(contract.files)):
            raise FormatError(f"{path / 'config.json'}: variant {variant.name!r} uses {missing[0]}, not in files.")


def _named(variant: Variant) -> set[str]:
    return {*variant.weights, *(graph.file for graph in variant.graphs)}
