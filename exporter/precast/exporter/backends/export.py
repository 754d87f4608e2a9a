"""The `export` backend: graphs of torch.export as portable files, weights in one safetensors file for all of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch._export.serde.serialize import serialize

from precast.runtime.artifact.pt2.format import pack, parse_program, unpack
from precast.runtime.artifact.schema import Compiler, Host, Variant
from precast.runtime.errors import ExportError, FormatError

from ..kinds.trace import Program
from ..options import ExportOptions
from ..progress import progress
from . import Compiled, release_of
from .aten.lowered import Lowered, LoweringOptions
from .aten.lowering import lower
from .aten.safetensors import save_weights
from .program_hash import hash_programs

__all__ = ["ExportCompiler"]

WEIGHTS = "model.safetensors"


class ExportCompiler:
    """Programs lowered to ATen, each as torch's own JSON of the graph; nothing is pickled."""

    def compile(self, programs: Iterable[Program], stage: Path, options: ExportOptions) -> Compiled:
        """See ProgramCompiler."""
        with warnings.catch_warnings():
            # torch warns of itself.
            warnings.simplefilter("ignore", FutureWarning)
            lowered = [lower(program, LoweringOptions()) for program in programs]
        graphs = []
        for done, each in enumerate(lowered):
            progress(done, len(lowered), each.graph.name)
            graph = replace(each.graph, file=f"{each.graph.name}.pt2")
            (stage / graph.file).write_bytes(_archive(each))
            graphs.append(graph)
        save_weights(lowered, stage / WEIGHTS)
        return Compiled(
            graphs=graphs,
            weights=[WEIGHTS],
            host=Host(platforms=[], device="cpu", isa=[], min_versions={"torch": "2.9"}),
            compiler=Compiler(
                name="torch.export",
                version=release_of("torch"),
                options={},
                torch=release_of("torch"),
                transformers=version("transformers"),
            ),
            program=hash_programs(each.exported for each in lowered),
        )

    def write_weights(self, programs: Iterable[Program], stage: Path, old: Variant, options: ExportOptions) -> Compiled:
        """See WritesWeights: nothing takes long here."""
        return self.compile(programs, stage, options)


def _archive(lowered: Lowered) -> bytes:
    """Serialize a program. Raises ExportError where the runtime would refuse it."""
    serialized = serialize(
        lowered.exported, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
    )
    document = json.loads(serialized.exported_program)
    text = json.dumps(_strip_sources(document), separators=(",", ":"), allow_nan=False).encode()
    data = pack(text)
    try:
        parse_program(unpack(data, lowered.graph.name), lowered.graph.name)
    except FormatError as error:
        raise ExportError(f"The backend export cannot write this model: {error} Try backend='onnx'.") from error
    return data


def _strip_sources(document: dict[str, Any]) -> dict[str, Any]:
    """Strip source paths and guards: paths name files of this machine, and guards are Python code, in whose place the
    runtime checks shapes by the contract."""
    module = document["graph_module"]
    for node in module["graph"]["nodes"]:
        node["metadata"] = {}
        if node["target"] == "torch.ops.aten._assert_scalar.default":
            node["inputs"][1]["arg"] = {"as_string": "a size is out of its bounds"}
    root = [entry for entry in module["module_call_graph"] if entry["fqn"] == ""]
    module |= {"metadata": {}, "module_call_graph": root, "treespec_namedtuple_fields": {}}
    return document | {"guards_code": [], "torch_version": str(torch.__version__).split("+", maxsplit=1)[0]}
