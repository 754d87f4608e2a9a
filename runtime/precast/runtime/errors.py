"""Every error that precast raises on purpose. This module imports nothing that takes time.

PrecastError                 something the user can act on; the CLI prints it as one line and exits with 1
├── UsageError               the call itself is wrong (a bad value, a missing argument); the CLI exits with 2
│   └── InputError           the tensors or texts given to a model do not fit it
├── CheckpointError          the checkpoint cannot be read, or is of a kind that precast cannot export
├── ExportError              a step of the export failed
│   └── AccuracyError        the compiled model does not give the reference's answers
├── PublishError             the artifact could not be written where it was asked for
├── OutOfMemoryError         what was asked for does not fit into this machine's memory; a MemoryError, too
└── ArtifactError            an artifact cannot be opened
    ├── FormatError          its config.json or another of its files breaks its format, or is of a newer one
    ├── IntegrityError       a file is missing, truncated or altered
    ├── TrustError           it holds native code that nobody vouched for
    ├── HostError            no variant of it runs on this machine
    └── HubError             it could not be fetched from, or pushed to, the Hub
"""

from .terminal import printable

__all__ = [
    "AccuracyError",
    "ArtifactError",
    "CheckpointError",
    "ExportError",
    "FormatError",
    "HostError",
    "HubError",
    "InputError",
    "IntegrityError",
    "OutOfMemoryError",
    "PrecastError",
    "PrecastWarning",
    "PublishError",
    "TrustError",
    "UsageError",
]


class PrecastError(Exception):
    """Base of all errors with a message written for the user. It may quote an artifact or a checkpoint: shown, it holds
    nothing that a terminal would obey."""

    def __str__(self) -> str:
        return printable(super().__str__())


class PrecastWarning(RuntimeWarning):
    """Something goes another way than was asked for, with the same answers; the CLI prints it as one line."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(PrecastError, ValueError):
    """An argument is wrong or missing."""


class InputError(UsageError):
    """Tensors or texts do not fit the compiled model."""


class CheckpointError(PrecastError):
    """The checkpoint cannot be read or is not supported."""


class ExportError(PrecastError):
    """A step of the export failed."""


class AccuracyError(ExportError):
    """The compiled model's answers are not the reference's."""


class PublishError(PrecastError):
    """The artifact could not be written."""


class OutOfMemoryError(PrecastError, MemoryError):
    """There is not so much memory."""


class ArtifactError(PrecastError):
    """The artifact cannot be opened."""


class FormatError(ArtifactError):
    """config.json breaks the artifact contract, or another file is not what its format allows."""


class IntegrityError(ArtifactError):
    """A listed file is missing, truncated or altered."""


class TrustError(ArtifactError):
    """Native code without proof of where it comes from."""


class HostError(ArtifactError):
    """No variant of the artifact runs here."""


class HubError(ArtifactError):
    """A Hub transfer failed."""
