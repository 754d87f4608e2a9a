"""Neuron's files made by hand: NEFFs, archives that hold them, and the folders of machines with devices."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile

from precast.runtime.hosts.neuron import ROOT_VARIABLE


def neff(major=2, minor=0, *, cores=1, lnc=1, features=0, build=b"2.21.33363.0", payload=None):
    """A NEFF as AWS documents its layout: field by field, so that a mistake in HEADER shows."""
    content = tarball() if payload is None else payload
    header = b"".join(
        [
            struct.pack("<QQQQQ", 2, 1024, len(content), major, minor),
            build.ljust(128, b"\0"),
            struct.pack("<I", cores),
            b"h" * 32,
            bytes(range(16)),
            b"model.neff".ljust(256, b"\0"),
            struct.pack("<I", cores),
            bytes([cores]).ljust(64, b"\0"),
            struct.pack("<Q", features),
            struct.pack("<I", lnc),
            bytes(468),
        ]
    )
    return header + content


def tarball(compress="gz"):
    """What is behind the header, compressed or not."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=f"w:{compress}") as archive:
        archive.addfile(tarfile.TarInfo("neff.json"))
    return content.getvalue()


def torchscript(path, *neffs):
    """An archive as torch.jit.save writes them, with NEFFs somewhere in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index, content in enumerate(neffs):
            archive.writestr(f"model/data/{index}", b"\x80\x02X" + content)
        archive.writestr("model/data.pkl", b"\0" * 3000)
    return path


def machine_at(root, instance="Inf2", devices=1, cores=2, *, driver=True):
    """The files of a machine with Neuron devices below `root`."""
    for index in range(devices):
        (root / "dev").mkdir(parents=True, exist_ok=True)
        (root / f"dev/neuron{index}").touch()
        folder = root / f"sys/devices/virtual/neuron_device/neuron{index}"
        if driver:
            (folder / "info/architecture").mkdir(parents=True)
            (folder / "core_count").write_text(f"{cores}\n")
            (folder / "info/architecture/instance_type").write_text(f"{instance}\n")
    return {ROOT_VARIABLE: str(root)}
