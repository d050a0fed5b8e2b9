"""Model files that must be refused: a table of makers, each with what the message must say."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

BODY = """<ir_version: 8, opset_import: ["" : 13]>
net (float[batch,4] x) => (float[batch,3] y)
<float[4,3] W = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {1,2,3}>
{ h = MatMul(x, W)  y = Add(h, b) }"""


def small_model(text: str = BODY) -> onnx.ModelProto:
    """A valid model of a few nodes."""
    return parser.parse_model(text)


@dataclass(frozen=True)
class Hostile:
    """A file that must be refused.

    Args:
        make: writes it into a folder and returns its path.
        says: what the error message must contain.
    """

    make: Callable[[Path], Path]
    says: str


HOSTILE: dict[str, Hostile] = {}


def hostile(name: str, says: str) -> Callable[[Callable], Callable]:
    """Put a maker into the table; it takes a folder and returns a path, bytes or a proto."""

    def add(maker: Callable) -> Callable:
        HOSTILE[name] = Hostile(lambda folder: _written(maker(folder), folder), says)
        return maker

    return add


def _written(result: Path | bytes | onnx.ModelProto, folder: Path) -> Path:
    if isinstance(result, Path):
        return result
    path = folder / "model.onnx"
    path.write_bytes(result if isinstance(result, bytes) else result.SerializeToString())
    return path


def _edited(edit: Callable[[onnx.ModelProto], object], text: str = BODY) -> onnx.ModelProto:
    model = small_model(text)
    edit(model)
    return model


# Files that are no model, or not a whole one.

VALID = small_model().SerializeToString()
BYTES = {
    "empty": (b"", "empty"),
    "text": (b"This is a model.\n" * 9, "is text"),
    "html": ("<!DOCTYPE html>\n<title>404 Störung</title>".encode(), "is text"),
    "text protobuf": (str(small_model()).encode(), "is text"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "git-lfs pointer",
    ),
    "gzip": (gzip.compress(VALID), "compressed with gzip"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "random bytes": (np.random.default_rng(0).bytes(400), "not an ONNX model"),
    "zeros": (bytes(100), "not an ONNX model"),
    "truncated": (VALID[: len(VALID) // 2], "truncated"),
    "cut behind the graph": (VALID[: VALID.index(b"\x42\x04\x0a\x00\x10\x0d")], "no opset"),
    "trailing garbage": (VALID + b"\xffgarbage", "do not belong"),
    "trailing zeros": (VALID + bytes(8), "do not belong"),
    "trailing line": (VALID + b"\n", "do not belong"),
    "twice in one file": (VALID + VALID, "defined twice"),
    "corrupt inside": (VALID.replace(b"MatMul", b"MatM\xff\xff"), "not UTF-8"),
    "corrupt length inside": (VALID.replace(b"\x0a\x01x", b"\x0a\x7fx", 1), "corrupt"),
    "no graph": (b"\x08\x08\x42\x04\x0a\x00\x10\x0d", "no graph"),
}
for _name, (_data, _says) in BYTES.items():
    HOSTILE[_name] = Hostile(lambda folder, data=_data: _written(data, folder), _says)


@hostile("missing file", "No such file")
def _missing(folder: Path) -> Path:
    return folder / "nothing.onnx"


@hostile("directory", "not a regular file")
def _directory(folder: Path) -> Path:
    return folder


@hostile("fifo", "not a regular file")
def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.onnx")
    return folder / "pipe.onnx"


# External data.


def external_model(folder: Path, place: str, **entries: str) -> onnx.ModelProto:
    """The small model with the values of W in a file; ``entries`` replace offset and length."""
    model = small_model()
    weight = model.graph.initializer[0]
    (folder / "weights.bin").write_bytes(numpy_helper.to_array(weight).tobytes())
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": place, "offset": "0", "length": "48", **entries}.items():
        weight.external_data.add(key=key, value=value)
    return model


def _link(folder: Path, make: Callable[[Path, Path], object]) -> onnx.ModelProto:
    model = external_model(folder, "link.bin")
    make(folder / "weights.bin", folder / "link.bin")
    return model


def _inner(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


EXTERNAL = {
    "data: ..": ("../weights.bin", {}, "leaves the model's directory"),
    "data: .. inside": ("sub/../../weights.bin", {}, "leaves the model's directory"),
    "data: backslash": ("..\\weights.bin", {}, "leaves the model's directory"),
    "data: absolute": ("/etc/hostname", {}, "is absolute"),
    "data: drive": ("C:\\weights.bin", {}, "is absolute"),
    "data: device": ("/dev/zero", {}, "is absolute"),
    "data: empty": ("", {}, "location is empty"),
    "data: dot": (".", {}, "location is empty"),
    "data: nul": ("weights.bin\0", {}, "leaves the model's directory"),
    "data: memory address": ("*/_ORT_MEM_ADDR_/*", {}, "leaves the model's directory"),
    "data: missing": ("nothing.bin", {}, "No such file"),
    "data: very long name": ("w" * 100_000, {}, "too long"),
    "data: negative offset": ("weights.bin", {"offset": "-4"}, "not a number of bytes"),
    "data: hexadecimal": ("weights.bin", {"offset": "0x0"}, "not a number of bytes"),
    "data: offset beyond the end": ("weights.bin", {"offset": "4"}, "ends at 48"),
    "data: huge offset": ("weights.bin", {"offset": "9" * 19}, "ends at 48"),
    "data: endless offset": ("weights.bin", {"offset": "9" * 5000}, "not a number of bytes"),
    "data: huge length": ("weights.bin", {"length": str(2**62)}, "take 48 bytes"),
    "data: short length": ("weights.bin", {"length": "44"}, "take 48 bytes"),
}
for _name, (_place, _entries, _says) in EXTERNAL.items():

    def _external(folder: Path, place: str = _place, entries: dict = _entries) -> Path:
        model = external_model(folder, place, **entries)
        return _written(model, _inner(folder, "sub") if ".." in place else folder)

    HOSTILE[_name] = Hostile(_external, _says)


@hostile("data: symbolic link", "symbolic link")
def _symlink(folder: Path) -> onnx.ModelProto:
    return _link(folder, lambda real, link: link.symlink_to(real))


@hostile("data: hard link", "hard link")
def _hardlink(folder: Path) -> onnx.ModelProto:
    return _link(folder, lambda real, link: link.hardlink_to(real))


@hostile("data: fifo", "not a regular file")
def _data_fifo(folder: Path) -> onnx.ModelProto:
    return _link(folder, lambda real, link: os.mkfifo(link))


@hostile("data: directory", "not a regular file")
def _data_directory(folder: Path) -> onnx.ModelProto:
    return _link(folder, lambda real, link: link.mkdir())


@hostile("data: linked directory", "symbolic link")
def _data_linked_directory(folder: Path) -> onnx.ModelProto:
    (folder / "link").symlink_to(folder, target_is_directory=True)
    return external_model(folder, "link/weights.bin")


@hostile("data: key twice", "key is given twice")
def _data_key_twice(folder: Path) -> onnx.ModelProto:
    model = external_model(folder, "weights.bin")
    model.graph.initializer[0].external_data.add(key="location", value="../weights.bin")
    return model


@hostile("data: inside and outside", "inside and outside")
def _data_both(folder: Path) -> onnx.ModelProto:
    model = external_model(folder, "weights.bin")
    model.graph.initializer[0].raw_data = bytes(48)
    return model


@hostile("data: of a Constant", "leaves the model's directory")
def _data_of_constant(folder: Path) -> onnx.ModelProto:
    model = external_model(folder, "../weights.bin")
    node = helper.make_node("Constant", [], ["W"], value=model.graph.initializer[0])
    del model.graph.initializer[0]
    model.graph.node.insert(0, node)
    return model


# Edits of a valid proto: what, what the message says.


def _weight(**fields: object) -> Callable[[onnx.ModelProto], object]:
    """Replace fields of W; dims, raw_data and others as given, the values first of all."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        raw = numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("float_data")
        tensor.raw_data = raw
        for field, value in fields.items():
            if isinstance(value, list):
                getattr(tensor, field)[:] = value
            elif value is None:
                tensor.ClearField(field)
            else:
                setattr(tensor, field, value)

    return edit


def _value(number: float, name: str = "W") -> Callable[[onnx.ModelProto], object]:
    def edit(model: onnx.ModelProto) -> None:
        next(t for t in model.graph.initializer if t.name == name).float_data[1] = number

    return edit


def _repeat(field: str) -> Callable[[onnx.ModelProto], object]:
    def edit(model: onnx.ModelProto) -> None:
        entries = getattr(model.graph, field)
        entries.append(entries[0])

    return edit


def _node(index: int, **fields: object) -> Callable[[onnx.ModelProto], object]:
    def edit(model: onnx.ModelProto) -> None:
        node = model.graph.node[index]
        for field, value in fields.items():
            if isinstance(value, list):
                getattr(node, field)[:] = value
            else:
                setattr(node, field, value)

    return edit


def sparse_weight(
    indices: np.ndarray, values: np.ndarray, dims: list[int]
) -> Callable[[onnx.ModelProto], object]:
    """Replace W by a sparse initializer."""

    def edit(model: onnx.ModelProto) -> None:
        del model.graph.initializer[0]
        sparse = model.graph.sparse_initializer.add(dims=dims)
        sparse.values.CopyFrom(numpy_helper.from_array(values, "W"))
        sparse.indices.CopyFrom(numpy_helper.from_array(indices))

    return edit


def _sparse(
    indices: list, dims: list[int] | None = None, count: int | None = None
) -> Callable[[onnx.ModelProto], object]:
    array = np.array(indices, np.int64)
    values = np.ones(len(array) if count is None else count, np.float32)
    return sparse_weight(array, values, dims or [4, 3])


def _attribute(index: int, **attributes: object) -> Callable[[onnx.ModelProto], None]:
    """Attributes of a node; a value "@name" refers to an attribute of a function."""

    def edit(model: onnx.ModelProto) -> None:
        node = model.graph.node[index]
        for name, value in attributes.items():
            if isinstance(value, str) and value.startswith("@"):
                kind = onnx.AttributeProto.FLOAT
                node.attribute.add(name=name, ref_attr_name=value[1:], type=kind)
            else:
                node.attribute.append(helper.make_attribute(name, value))

    return edit


def _gemm(**attributes: object) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "Gemm"
        _attribute(0, **attributes)(model)

    return edit


def _constant(**attributes: object) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], **attributes))

    return edit


def _deep_input(model: onnx.ModelProto) -> None:
    for _ in range(63):
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)


EDITS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "no nodes": (lambda m: m.graph.ClearField("node"), "no nodes"),
    "no opset": (lambda m: m.ClearField("opset_import"), "no opset"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "no outputs"),
    "no ir_version": (lambda m: m.ClearField("ir_version"), "ir_version"),
    "opset of another domain only": (
        lambda m: setattr(m.opset_import[0], "domain", "com.nobody"),
        "no opset for the domain",
    ),
    "dims 2^40": (_weight(dims=[2**40, 2**40]), "too large"),
    "dims 2^40, one axis": (_weight(dims=[2**40]), "bytes, but 48 are stored"),
    "dims 2^40 beside an empty axis": (_weight(dims=[2**40, 2**40, 0]), "too large"),
    "negative dims": (_weight(dims=[-4, -3]), "negative size"),
    "raw data too short": (_weight(raw_data=bytes(47)), "needs 48 bytes"),
    "raw data too long": (_weight(raw_data=bytes(49)), "needs 48 bytes"),
    "no data": (_weight(raw_data=None), "needs 12 values"),
    "values in the wrong field": (_weight(raw_data=None, int64_data=[1] * 12), "wrong field"),
    "values in two fields": (_weight(float_data=[1] * 12), "several fields"),
    "too few values": (_weight(raw_data=None, float_data=[1] * 11), "needs 12 values"),
    "zero-size axis with data": (_weight(dims=[0, 3]), "needs 0 bytes"),
    "raw strings": (_weight(data_type=TensorProto.STRING), "wrong field"),
    "element type 99": (_weight(data_type=99), "unknown element type"),
    "no element type": (_weight(data_type=0), "unknown element type"),
    "segmented": (lambda m: m.graph.initializer[0].segment.SetInParent(), "several fields"),
    "initializer twice": (_repeat("initializer"), "initializer 'W' is defined twice"),
    "input twice": (_repeat("input"), "input 'x' is defined twice"),
    "node twice": (_repeat("node"), "tensor 'h' is defined twice"),
    "initializer computed too": (_node(0, output=["b"]), "tensor 'b' is defined twice"),
    "missing input": (_node(0, input=["x", "V"]), "reads 'V', which does not exist"),
    "missing output": (_node(1, output=["z"]), "nothing computes the output 'y'"),
    "cyclic": (_node(0, input=["y", "W"]), "cyclic"),
    "self-loop": (_node(0, input=["h", "W"]), "cyclic"),
    "unknown operator": (_node(0, op_type="Frobnicate"), "unknown operator 'Frobnicate'"),
    "operator of a later opset": (_node(0, op_type="Gelu"), "unknown operator 'Gelu'"),
    "negative opset": (lambda m: setattr(m.opset_import[0], "version", -1), "unknown operator"),
    "domain without opset": (_node(0, domain="com.nobody"), "no opset for the domain"),
    "too few inputs": (_node(0, input=["x"]), "invalid model"),
    "hostile name": (_node(0, op_type="\x1b[31m\n" + "x" * 2**20), "\\x1b[31m\\n"),
    "attribute of no function": (_gemm(alpha="@q"), "'alpha' refers to 'q'"),
    "attribute that is NaN": (_gemm(beta=float("nan")), "'beta' of 'h' (1 NaN"),
    "attribute that is infinite": (_gemm(alpha=float("inf")), "'alpha' of 'h' (0 NaN, 1 inf"),
    "Constant with two values": (_constant(value_float=1.0, value_int=1), "exactly one"),
    "Constant without a value": (_constant(), "no value"),
    "65 axes": (_weight(dims=[4, 3] + [1] * 63), "tensor 'W' has 65 axes"),
    "65 axes of an input": (_deep_input, "tensor 'x' has 65 axes"),
    "NaN": (_value(float("nan")), "'W' (1 NaN, 0 infinite)"),
    "NaN in a bias": (_value(float("nan"), "b"), "'b' (1 NaN, 0 infinite)"),
    "infinite weight": (_value(float("-inf")), "'W' (0 NaN, 1 infinite)"),
    "sparse: out of range": (_sparse([3, 12]), "out of range"),
    "sparse: negative": (_sparse([-1, 3]), "out of range"),
    "sparse: unsorted": (_sparse([5, 3]), "not sorted"),
    "sparse: duplicated": (_sparse([3, 3]), "not unique"),
    "sparse 2-D: out of range": (_sparse([[0, 3]]), "out of range"),
    "sparse 2-D: negative": (_sparse([[1, -1]]), "out of range"),
    "sparse 2-D: unsorted": (_sparse([[1, 0], [0, 2]]), "not sorted"),
    "sparse: wrong rank": (_sparse([[0, 0, 1]]), "indices of shape"),
    "sparse: too few indices": (_sparse([1], count=2), "indices of shape"),
    "sparse: giant": (_sparse([3], [2**20, 2**20]), "too much memory"),
    "sparse: absurd": (_sparse([3], [2**14, 2**15 - 512]), "stand for 2113929216 when made dense"),
    "sparse: overflowing": (_sparse([3], [2**40, 2**40]), "too large"),
    "sparse: negative size": (_sparse([3], [-4, -3]), "negative size"),
}
for _name, (_edit, _says) in EDITS.items():
    HOSTILE[_name] = Hostile(
        lambda folder, edit=_edit: _written(_edited(edit), folder),  # type: ignore[misc]
        _says,
    )


# Deep and endless structures.


@hostile("If in If in If ...", "nested too deeply")
def _deep(folder: Path) -> bytes:
    """Built byte by byte, for protobuf does not serialise what it would not parse."""

    def field(number: int, content: bytes) -> bytes:
        length, size = len(content), bytearray()
        while length > 127:
            size.append(length & 127 | 128)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + content

    graph = field(1, field(2, b"y") + field(4, b"Identity") + field(1, b"x"))
    for _ in range(200):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute))
    return b"\x08\x08" + field(7, graph) + b"\x42\x04\x0a\x00\x10\x0d"


def with_functions(bodies: dict[str, str], call: str) -> onnx.ModelProto:
    """A model that calls local functions f(x) => (y), given by their bodies."""
    functions = "\n".join(
        f'<domain: "local", opset_import: ["" : 13, "local" : 1]> {name} (x) => (y) {{ {body} }}'
        for name, body in bodies.items()
    )
    return parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13, "local" : 1]> '
        f"g (float[2] x) => (float[2] y) {{ y = local.{call}(x) }}\n{functions}"
    )


@hostile("function bomb", "expand to more than 1000000 nodes")
def _bomb(folder: Path) -> onnx.ModelProto:
    bodies = {"f0": "y = Relu(x)"}
    for i in range(25):
        bodies[f"f{i + 1}"] = f"h = local.f{i}(x) y = local.f{i}(h)"
    return with_functions(bodies, "f25")


@hostile("function bomb, never called", "expand to more than 1000000 nodes")
def _dormant_bomb(folder: Path) -> onnx.ModelProto:
    model = _bomb(folder)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Relu", ""
    return model


@hostile("long chain of bombs", "expand to more than 1000000 nodes")
def _long_bomb(folder: Path) -> onnx.ModelProto:
    bodies = {"f0": "y = Relu(x)"}
    for i in range(2000):
        bodies[f"f{i + 1}"] = f"h = local.f{i}(x) y = local.f{i}(h)"
    return with_functions(bodies, "f2000")


@hostile("recursive function", "in a circle")
def _recursive(folder: Path) -> onnx.ModelProto:
    return with_functions({"f": "y = local.f(x)"}, "f")


@hostile("functions that call each other", "in a circle")
def _mutual(folder: Path) -> onnx.ModelProto:
    return with_functions({"f": "y = local.g(x)", "g": "y = local.f(x)"}, "f")


@hostile("function twice", "function is defined twice")
def _function_twice(folder: Path) -> onnx.ModelProto:
    model = with_functions({"f": "y = Relu(x)"}, "f")
    model.functions.append(model.functions[0])
    return model


@hostile("too many inputs of a function", "has 2 inputs, but the local function 'f' has 1")
def _surplus_input(folder: Path) -> onnx.ModelProto:
    model = with_functions({"f": "y = Relu(x)"}, "f")
    model.graph.node[0].input.append("")
    return model


@hostile("too many outputs of a function", "has 2 outputs, but the local function 'f' has 1")
def _surplus_output(folder: Path) -> onnx.ModelProto:
    model = with_functions({"f": "y = Relu(x)"}, "f")
    model.graph.node[0].output.append("z")
    return model


@hostile("functions that call each other 1500 deep", "call each other 1501 deep")
def _long_chain(folder: Path) -> onnx.ModelProto:
    bodies = {"f0": "y = Relu(x)"}
    bodies |= {f"f{i + 1}": f"y = local.f{i}(x)" for i in range(1500)}
    return with_functions(bodies, "f1500")


@hostile("Ifs in functions, 40 deep together", "If and Loop bodies 40 deep")
def _deep_ifs(folder: Path) -> onnx.ModelProto:
    branch = "{0} = g () => (float[2] {0}) {{ {0} = {1}(x) }}"
    bodies = {"f0": "y = Relu(x)"}
    for i in range(40):
        either = branch.format("p", f"local.f{i}").replace("p = g", "then_branch = g", 1)
        other = branch.format("q", "Relu").replace("q = g", "else_branch = g", 1)
        bodies[f"f{i + 1}"] = f"c = Constant <value = bool {{1}}> () y = If (c) <{either}, {other}>"
    return with_functions(bodies, "f40")


CONV = """<ir_version: 8, opset_import: ["" : 13]>
net (float[batch,1,8,8] x) => (float[batch,2,h,w] y)
<float[2,1,1,1] W = {1,2}> { y = Conv <ATTRIBUTES> (x, W) }"""
WINDOWS = {
    "pads = [1]": "1 pads; two per axis",
    "pads = [1, 1]": "the numbers of axes differ: pads 1, the kernel 2",
    "strides = [1, 1, 1]": "the numbers of axes differ: strides 3, the kernel 2",
    "strides = [0, 1]": "strides [0, 1] must be positive",
    "dilations = [1, -1]": "dilations [1, -1] must be positive",
}
for _attributes, _says in WINDOWS.items():
    HOSTILE[f"Conv with {_attributes}"] = Hostile(
        lambda folder, text=_attributes: _written(  # type: ignore[misc]
            small_model(CONV.replace("ATTRIBUTES", text)), folder
        ),
        _says,
    )
