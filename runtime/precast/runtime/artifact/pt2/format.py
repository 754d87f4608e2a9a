"""A torch.export program as a file, read without torch.

Opening a `.pt2` with torch runs what it holds: it unpickles weights, constants and example inputs, and evaluates
symbolic expressions and guards as Python. Here a `.pt2` is torch's archive around torch's JSON of the graph, and
nothing else: weights lie in a safetensors file. Everything in the archive but that JSON is fixed, so a file is good if
it is, to the byte, what `pack` makes of its JSON. The JSON is then taken apart into plain values; none of its strings
is evaluated, imported or used as a path.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from ...errors import FormatError
from .. import strict_json
from .allowed_operators import ATEN, PYTHON

__all__ = ["SCALAR_TYPES", "Coded", "Graph", "Meta", "Node", "Ref", "Symbolic", "pack", "parse_program", "unpack"]

SCHEMA_MAJOR = 8
"""Of torch's serialization schema; torch raises it where older readers would misread a file."""

_MEMBERS: tuple[tuple[str, bytes | None], ...] = (
    ("model/models/model.json", None),
    ("model/archive_format", b"pt2"),
    ("model/archive_version", b"0"),
    ("model/.data/version", b"6\n"),
    ("model/byteorder", b"little"),
)
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_EPOCH = 0x0021
"""1980-01-01, the first day of a zip archive."""


def pack(program: bytes) -> bytes:
    """The archive that holds `program`, torch's JSON of one graph: the same bytes for the same program."""
    body, directory = BytesIO(), BytesIO()
    for name, fixed in _MEMBERS:
        data = program if fixed is None else fixed
        common = (20, 0, 0, 0, _EPOCH, zlib.crc32(data), len(data), len(data), len(name), 0)
        start = body.tell()
        body.write(_LOCAL.pack(b"PK\3\4", *common) + name.encode() + data)
        directory.write(_CENTRAL.pack(b"PK\1\2", 20, *common, 0, 0, 0, 0, start) + name.encode())
    entries, start = directory.getvalue(), body.tell()
    end = _END.pack(b"PK\5\6", 0, 0, len(_MEMBERS), len(_MEMBERS), len(entries), start, 0)
    return body.getvalue() + entries + end


_OVERHEAD = len(pack(b""))
_START = _LOCAL.size + len(_MEMBERS[0][0])


def unpack(data: bytes, name: str) -> bytes:
    """The JSON in an archive. Raises FormatError where the file `name` is not to the byte what `pack` writes."""
    program = data[_START : _START + len(data) - _OVERHEAD] if len(data) >= _OVERHEAD else b""
    if len(program) > strict_json.MAX_BYTES:
        raise FormatError(f"{name} has {len(data):,} bytes, more than the {strict_json.MAX_BYTES:,} that are read.")
    if pack(program) != data:
        raise FormatError(
            f"{name} is not a graph as precast writes it: {_describe_difference(data)}. It is not opened, since what "
            f"torch would read into it could run code. Export the model again, or get the artifact from who made it."
        )
    return program


def _describe_difference(data: bytes) -> str:
    """Describe, for the message, how an archive differs from one that `pack` wrote."""
    if not data.startswith(b"PK"):
        return "it is a pickle" if data[:1] == b"\x80" else "it is not an uncompressed zip archive"
    try:
        members = zipfile.ZipFile(BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return "its zip directory is damaged or cut off"
    names, expected = [member.filename for member in members], [name for name, _ in _MEMBERS]
    found = [f"it holds {name[:80]!r}" for name in names if name not in expected]
    found += [f"it lacks {name}" for name in expected if name not in names]
    found += ["it holds two members of one name"] if len(set(names)) < len(names) else []
    found += ["a member is compressed"] if any(member.compress_type for member in members) else []
    return (found or ["the bytes around its JSON differ"])[0]


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by name."""

    name: str


@dataclass(frozen=True)
class Coded:
    """A dtype, layout, memory format or device, as torch's schema writes it."""

    kind: str
    value: int | str


@dataclass(frozen=True)
class Symbolic:
    """A size that depends on the inputs."""


Argument = Any
"""None, bool, int, float, str, Ref, Coded, or a list of them."""

SCALAR_TYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    10: "complex64",
    12: "bool",
    13: "bfloat16",
}
"""The numbers that torch's schema gives to dtypes."""


@dataclass(frozen=True)
class Meta:
    """The dtype, by name, of a tensor, and its shape and strides in elements."""

    dtype: str
    shape: tuple[int | Symbolic, ...]
    strides: tuple[int | Symbolic, ...]


@dataclass(frozen=True)
class Node:
    """One call. `outputs` names its results: a str each, None for one that is not used, a list for a list."""

    target: str
    args: list[Argument]
    kwargs: dict[str, Argument]
    outputs: list[str | list[str] | None]


@dataclass(frozen=True)
class Graph:
    """A program whose every name is defined once and before it is used.

    Attributes:
        weights: value name -> the weight's full name.
        inputs: names of the user's inputs, in order.
        nodes: the calls, in order.
        outputs: the values that the user gets, in order.
        updates: input name -> the value that it holds afterwards.
        metas: of the weights, inputs and outputs at least.
    """

    weights: dict[str, str]
    inputs: list[str]
    nodes: list[Node]
    outputs: list[Ref]
    updates: dict[str, str]
    metas: dict[str, Meta] = field(default_factory=dict)


def parse_program(program: bytes, name: str) -> Graph:
    """The graph that torch's JSON describes. Raises FormatError, which names the file `name` and what is wrong."""
    whole = strict_json.loads(program, name)
    try:
        return _Parser().parse(whole)
    except _Refusal as error:
        raise FormatError(f"{name} is refused: {error}.") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FormatError(f"{name} is not a program as torch.export writes it ({reason}).") from error


class _Refusal(Exception):  # noqa: N818
    pass


_NAME = re.compile(r"[A-Za-z_]\w{0,255}\Z", re.ASCII)
_FQN = re.compile(r"[\w.]{1,512}\Z", re.ASCII)
_ATEN = re.compile(r"torch\.ops\.aten\.(\w{1,80})\.(\w{1,80})\Z", re.ASCII)
_INTEGER = 2**63
_DEPTH = 4


class _Parser:
    """Reads torch's JSON field by field. A field of any other form is an error."""

    def __init__(self) -> None:
        self._defined: set[str] = set()

    def parse(self, whole: dict[str, Any]) -> Graph:
        _check_versions(whole)
        module = whole["graph_module"]
        graph, signature = module["graph"], module["signature"]
        _check_inert(whole, module, graph)
        metas = {_parse_name(key): _parse_meta(value) for key, value in _expect_dict(graph["tensor_values"]).items()}
        _check_symbols(graph)
        _check_ranges(whole)
        weights, inputs = self._parse_inputs(_expect_list(signature["input_specs"]))
        nodes = [self._parse_node(node) for node in _expect_list(graph["nodes"])]
        updates, outputs = self._parse_outputs(_expect_list(signature["output_specs"]), inputs)
        needed = [*weights, *inputs, *(output.name for output in outputs), *updates.values()]
        if lacking := [each for each in needed if each not in metas]:
            raise _Refusal(f"it does not say what {lacking[0]} is")
        return Graph(weights, inputs, nodes, outputs, updates, metas)

    def _parse_inputs(self, specs: list[Any]) -> tuple[dict[str, str], list[str]]:
        weights: dict[str, str] = {}
        inputs: list[str] = []
        for spec in specs:
            kind, value = _split_union(spec)
            if kind == "user_input":
                inputs.append(self._define_name(_expect_kind(value["arg"], "as_tensor")["name"]))
            elif kind in _WEIGHTS:
                weights[self._define_name(value["arg"]["name"])] = _match_name(_FQN, value[_WEIGHTS[kind]])
            else:
                raise _Refusal(f"it takes an input of the kind {kind[:40]!r}, not a tensor")
        return weights, inputs

    def _parse_outputs(self, specs: list[Any], inputs: list[str]) -> tuple[dict[str, str], list[Ref]]:
        updates: dict[str, str] = {}
        outputs: list[Ref] = []
        for spec in specs:
            kind, value = _split_union(spec)
            if kind == "user_output":
                outputs.append(self._use_name(_expect_kind(value["arg"], "as_tensor")["name"]))
            elif kind == "user_input_mutation":
                target = value["user_input_name"]
                if target not in inputs or target in updates:
                    raise _Refusal(f"it changes {target!r}, which is no input, or changes it twice")
                updates[target] = self._use_name(value["arg"]["name"]).name
            else:
                raise _Refusal(f"it gives an output of the kind {kind[:40]!r}, not a tensor or a changed input")
        return updates, outputs

    def _parse_node(self, node: dict[str, Any]) -> Node:
        target = _check_target(node["target"])
        args: list[Argument] = []
        kwargs: dict[str, Argument] = {}
        for given in _expect_list(node["inputs"]):
            value = self._parse_argument(given["arg"], 0)
            if given["kind"] == 2:
                kwargs[_parse_name(given["name"])] = value
            else:
                args.append(value)
        return Node(target, args, kwargs, [self._parse_result(output) for output in _expect_list(node["outputs"])])

    def _parse_argument(self, argument: dict[str, Any], depth: int) -> Argument:
        kind, value = _split_union(argument)
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if kind in _CODED:
            if type(value) is not int or value not in _CODES[kind]:
                raise _Refusal(f"it asks for the unknown {_CODED[kind]} {str(value)[:40]}")
            return Coded(_CODED[kind], value)
        if kind in _LISTS and depth < _DEPTH:
            return [self._parse_argument({_LISTS[kind]: each}, depth + 1) for each in _expect_list(value)]
        if kind in ("as_tensor", "as_name"):
            return self._use_name(value if kind == "as_name" else value["name"])
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
            return self._parse_argument(value, depth)
        raise _Refusal(f"it passes an argument of the kind {kind[:40]!r}")

    def _parse_result(self, output: dict[str, Any]) -> str | list[str] | None:
        kind, value = _split_union(output)
        if kind == "as_none":
            return None
        if kind == "as_tensor":
            return self._define_name(value["name"])
        if kind == "as_tensors":
            return [self._define_name(each["name"]) for each in _expect_list(value)]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._define_name(_expect_kind(value, "as_name"))
        raise _Refusal(f"it makes a result of the kind {kind[:40]!r}")

    def _define_name(self, name: Any) -> str:
        name = _parse_name(name)
        if name in self._defined:
            raise _Refusal(f"it defines {name} twice")
        self._defined.add(name)
        return str(name)

    def _use_name(self, name: Any) -> Ref:
        name = _parse_name(name)
        if name not in self._defined:
            raise _Refusal(f"it uses {name} before it is defined")
        return Ref(name)


def _check_target(target: Any) -> str:
    """Return `target`, if a graph may call it. Raises _Refusal."""
    if not isinstance(target, str):
        raise _Refusal("it calls something that has no name")
    if target in PYTHON:
        return target
    found = _ATEN.match(target)
    if found is None or found[1] not in ATEN or "out" in found[2].lower().split("_"):
        raise _Refusal(f"it calls {target[:120]!r}, which is not among the operators that a graph may call")
    return target


def _check_versions(whole: dict[str, Any]) -> None:
    major = whole["schema_version"]["major"]
    if major != SCHEMA_MAJOR:
        raise _Refusal(f"its schema version is {major!r}, where {SCHEMA_MAJOR} can be read")


def _check_inert(whole: dict[str, Any], module: dict[str, Any], graph: dict[str, Any]) -> None:
    """Refuse fields that torch would evaluate or import, although nothing here does."""
    for holder, key in ((whole, "guards_code"), (module, "treespec_namedtuple_fields"), (graph, "custom_obj_values")):
        if holder.get(key):
            raise _Refusal(f"it has {key}, which torch would run or import")
    for entry in _expect_list(module.get("module_call_graph", [])):
        signature = entry.get("signature") or {}
        for key in ("in_spec", "out_spec"):
            _check_tree(signature.get(key, ""))
    if any(node.get("metadata") for node in _expect_list(graph["nodes"])):
        raise _Refusal("its nodes have metadata, which precast leaves out")


_TREE = re.compile(r'(?:"type": (?:null|"builtins\.(?:tuple|list|dict)")|"context": (?:null|"null"|"\[\]")|'
                   r'"children_spec": \[|[\[\]{},1 ])*\Z')  # fmt: skip


def _check_tree(spec: str) -> None:
    """Structures of tuples and lists only: torch imports the module of any other type."""
    if not _TREE.match(spec):
        raise _Refusal("its inputs or outputs are arranged in something else than tuples and lists")


def _check_symbols(graph: dict[str, Any]) -> None:
    for key in ("sym_int_values", "sym_float_values", "sym_bool_values"):
        for value in _expect_dict(graph.get(key, {})).values():
            _parse_size(value)


def _check_ranges(whole: dict[str, Any]) -> None:
    for name, bounds in _expect_dict(whole.get("range_constraints", {})).items():
        _match_name(_SYMBOL, name)
        for bound in _expect_dict(bounds).values():
            if bound is not None:
                _parse_int(bound)


_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,9}\Z", re.ASCII)
_WEIGHTS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_CODED = {"as_scalar_type": "dtype", "as_layout": "layout", "as_memory_format": "memory_format"}
_CODES = {"as_scalar_type": frozenset(SCALAR_TYPES), "as_layout": {7}, "as_memory_format": {1, 2, 3, 4}}
_LISTS = {
    "as_tensors": "as_tensor",
    "as_ints": "as_int",
    "as_floats": "as_float",
    "as_bools": "as_bool",
    "as_sym_ints": "as_sym_int",
    "as_sym_floats": "as_sym_float",
    "as_sym_bools": "as_sym_bool",
    "as_optional_tensors": "as_optional_tensor",
    "as_nested_tensors": "as_tensors",
    "as_int_lists": "as_ints",
    "as_float_lists": "as_floats",
}
_SYMBOLS = re.compile(
    r"(?:(?:Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|PythonMod|Max|Min|FloorDiv|CleanDiv|IntTrueDiv|FloatTrueDiv|"
    r"CeilToInt|FloorToInt|TruncToInt|ToFloat|Where|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|"
    r"GreaterThan|And|Or|Not)\(|'[a-z]{1,8}\d{1,9}'|(?:positive|integer|nonnegative|real|evaluate)=(?:True|False)|"
    r"precision=\d{1,3}|'-?\d{1,20}(?:\.\d{0,30})?'|-?\d{1,20}|[), ])*\Z"
)


def _parse_size(value: Any) -> int | Symbolic | float | bool:
    """Parse a size. An expression is never evaluated, and must be plain arithmetic even so."""
    kind, inner = _split_union(value)
    if kind != "as_expr":
        return _PLAIN[kind](inner)  # type: ignore[no-any-return]
    text = inner["expr_str"]
    if not isinstance(text, str) or len(text) > 4096 or not _SYMBOLS.match(text):
        raise _Refusal(f"the size {str(text)[:80]!r} is not plain arithmetic")
    return Symbolic()


def _parse_meta(value: dict[str, Any]) -> Meta:
    if value["layout"] != 7 or _device_name(value["device"]) != "cpu":
        raise _Refusal("a tensor is not dense, or not in the memory of the CPU")
    if value["dtype"] not in SCALAR_TYPES:
        raise _Refusal(f"a tensor has the unknown dtype {value['dtype']!r}")
    shape, strides = (
        tuple(_parse_dimension(each) for each in _expect_list(value[key])) for key in ("sizes", "strides")
    )
    if len(shape) != len(strides) or len(shape) > 64:
        raise _Refusal("a tensor's shape and strides do not go together")
    return Meta(SCALAR_TYPES[value["dtype"]], shape, strides)


def _parse_dimension(value: Any) -> int | Symbolic:
    size = _parse_size(value)
    if isinstance(size, Symbolic):
        return size
    if type(size) is not int or not 0 <= size < 2**48:
        raise _Refusal(f"a tensor has the size {size!r}")
    return size


def _device_name(value: dict[str, Any]) -> str:
    return str(value["type"]) if value.get("index") in (None, 0) else f"{value['type']}:{value['index']}"


def _parse_device(value: dict[str, Any]) -> Coded:
    if _device_name(value) != "cpu":
        raise _Refusal(f"it asks for the device {_device_name(value)[:20]!r}, where there is only the CPU")
    return Coded("device", "cpu")


def _parse_int(value: Any) -> int:
    if type(value) is not int or abs(value) > _INTEGER:
        raise _Refusal(f"{str(value)[:40]!r} stands where a number should")
    return value


def _parse_float(value: Any) -> float:
    if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN"):
        return float(value)
    if type(value) not in (int, float):
        raise _Refusal(f"{str(value)[:40]!r} stands where a number should")
    return float(value)


def _parse_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Refusal(f"{str(value)[:40]!r} stands where true or false should")
    return value


def _parse_text(value: Any) -> str:
    return _match_name(re.compile(r"[\w ,.>-]{0,64}\Z", re.ASCII), value)


def _parse_none(value: Any) -> None:
    return None


_PLAIN: dict[str, Any] = {
    "as_none": _parse_none,
    "as_int": _parse_int,
    "as_float": _parse_float,
    "as_bool": _parse_bool,
    "as_string": _parse_text,
    "as_device": _parse_device,
}


def _split_union(value: Any) -> tuple[str, Any]:
    """Split a union, an object of one key, into its kind and its value."""
    if not isinstance(value, dict) or len(value) != 1:
        raise _Refusal(f"{str(value)[:60]!r} stands where one value with its kind should")
    return next(iter(value.items()))


def _expect_kind(value: Any, kind: str) -> Any:
    found, inner = _split_union(value)
    if found != kind:
        raise _Refusal(f"a value of the kind {found[:40]!r} stands where {kind} should")
    return inner


def _parse_name(value: Any) -> str:
    return _match_name(_NAME, value)


def _match_name(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise _Refusal(f"{str(value)[:60]!r} is not a name")
    return value


def _expect_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Refusal(f"{str(value)[:60]!r} stands where a list should")
    return value


def _expect_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Refusal(f"{str(value)[:60]!r} stands where an object should")
    return value
