"""A machine with the stand-in for the Neuron SDK, with devices or without, for this process and its children."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

SDK = Path(__file__).parent / "neuron_sdk"
VERSIONS = {
    "torch-neuronx": "2.9.0.2.11.1111",
    "neuronx-cc": "2.22.1111.0",
    "libneuronxla": "2.2.1111.0",
    "neuronx-distributed": "0.18.0",
}
MODULES = ("torch_neuronx", "libneuronxla", "neuronxcc", "neuronx_distributed", "neuron_stand_in")


def install(patch: pytest.MonkeyPatch, folder: Path, *, cores: int = 2, instance: str = "Trn1") -> None:
    """What installing the SDK would do, on a machine with so many NeuronCores; 0 is one without a device."""
    site = folder / "site"
    for name, version in VERSIONS.items():
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    _on_path(patch, SDK, site)
    devices(patch, folder / "root", cores=cores, instance=instance)


def devices(patch: pytest.MonkeyPatch, root: Path, *, cores: int, instance: str = "Trn1") -> None:
    """One device with so many cores, or none, as the driver's files show it."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "dev").mkdir(parents=True)
    if cores:
        (root / "dev/neuron0").touch()
        device = root / "sys/devices/virtual/neuron_device/neuron0"
        (device / "info/architecture").mkdir(parents=True)
        (device / "core_count").write_text(str(cores))
        (device / "info/architecture/instance_type").write_text(instance)
    patch.setenv("PRECAST_NEURON_ROOT", str(root))


def install_placeholders(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """What installing the SDK's names from PyPI does: packages that raise when they are imported."""
    for module in MODULES[:4]:
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text(
            "raise ImportError('WRONG PACKAGE. Please install the package from Neuron Repository - "
            "https://github.com/aws/aws-neuron-sdk#neuron-repository')\n"
        )
    _on_path(patch, folder)


def _on_path(patch: pytest.MonkeyPatch, *folders: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        # The stand-in registers operators, which a process can do once.
        if SDK not in folders or SDK not in Path(sys.modules[name].__file__ or "").parents:
            patch.delitem(sys.modules, name)
    for folder in reversed(folders):
        patch.syspath_prepend(str(folder))
    inherited = os.environ.get("PYTHONPATH", "")
    patch.setenv("PYTHONPATH", os.pathsep.join([*map(str, folders), *([inherited] if inherited else [])]))
