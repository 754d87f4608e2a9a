"""A whole backend in one file: it keeps each traced program as `.pt2` and runs it with torch.

Both halves are here because a plug-in's author would write them together; the runtime's half imports torch only when
it is used. Its tier is `native`: opening a `.pt2` runs what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from precast.exporter.options import BackendOptions, describe
from precast.runtime.artifact.backends import Backend
from precast.runtime.artifact.schema import Compiler, Host

ROW = Backend(
    "toy", "native", "toy_backend:ToyCompiler", "toy_backend:ToyEngine", options="toy_backend:ToyOptions",
    because="it keeps programs as they are",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ToyOptions(BackendOptions):
    """An option that every backend may have, and this one alone has: `--toy-note`, `ExportOptions(toy_note=…)`."""

    toy_note: str = field(default="", metadata=describe(metavar="TEXT", help_text="Kept in the artifact, in one line."))

    def problems(self) -> Iterator[str]:
        if len(self.toy_note.splitlines()) > 1:
            yield "toy_note is one line; leave out its line breaks."


class ToyCompiler:
    """Programs as they are."""

    def compile(self, programs: Iterable[Any], stage: Path, options: Any) -> Any:
        import torch

        from precast.exporter.backends import Compiled

        graphs = []
        for program in programs:
            graph = msgspec.structs.replace(program.graph, file=f"{program.graph.name}.pt2")
            torch.export.save(program.exported, stage / graph.file)
            graphs.append(graph)
        host = Host(platforms=[], device="cpu", isa=[], min_versions={"torch": "2.9"})
        note = {"toy_note": options.backend_options.toy_note} if options.backend_options.toy_note else {}
        compiler = Compiler(name="toy", version="1", options=note, torch=str(torch.__version__), transformers="any")
        return Compiled(graphs=graphs, weights=[], host=host, compiler=compiler)


class ToyEngine:
    """Runs a program and copies its results into the bound arrays."""

    def __init__(self, artifact: Any, variant: Any, settings: Any) -> None:
        import torch

        # The program calls our operator, whose eager meaning is its definition.
        import precast.exporter.operators.attention  # noqa: F401

        self._graphs = {graph.name: graph for graph in variant.graphs}
        self._modules = {
            name: torch.export.load(artifact.path / graph.file).module() for name, graph in self._graphs.items()
        }

    def bind(self, graph: str, inputs: Any, outputs: Any) -> Any:
        import torch

        spec, module = self._graphs[graph], self._modules[graph]
        tensors = [torch.from_numpy(inputs[each.name]) for each in spec.inputs]
        targets = [torch.from_numpy(outputs[each.name]) for each in spec.outputs]
        arguments = (*tensors[:4], tensors[4:]) if spec.cache else tuple(tensors)

        def step() -> None:
            for target, result in zip(targets, module(*arguments), strict=True):
                target.copy_(result)

        return step
