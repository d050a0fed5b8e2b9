"""Mutated models and arrays: every command ends with a documented code and two plain lines.

    python benchmarks/fuzz.py --seconds 60 --seed 1 --save escapes

Bytes and protobuf fields of small valid models, and bytes of .npz and .npy files, are changed at
random; ``inspect`` and ``optimize`` run on them in child processes, many cases in each. Case N of a
seed is the same whatever ran before. What escapes (an undocumented code, a traceback, an error
without a hint, a name of our own, an output beside an error) is saved, and the exit status is 1.
A crash of compiled code ends its child only; on the command line a parent process tells of it.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from click.testing import CliRunner
from google.protobuf.message import Message

from onnx_ecp.cli.commands import main as command_line

DOCUMENTED = (0, 2, 3, 4, 5, 6, 7, 8)
# A case that takes longer is counted as such: Loops may be endless, constants huge.
PATIENCE = 20
_HEAD = '<ir_version: 8, opset_import: ["": 17, "l": 1]>\nnet '


def _stored(name: str, *shape: int) -> str:
    """A stored tensor of various numbers, as ONNX text."""
    numbers = ",".join(str((7 * i % 11 - 5) / 4) for i in range(math.prod(shape)))
    return f"float[{','.join(map(str, shape))}] {name} = {{{numbers}}}"


_W = ", ".join((_stored("W", 4, 6), _stored("b", 6), _stored("V", 6, 3)))
_MLP = "{ h = Gemm(x, W, b) r = Relu(h) y = MatMul(r, V) }"
MODELS = {
    "mlp": f"(float[n,4] x) => (float[n,3] y) <{_W}> {_MLP}",
    "views": f"""(float[n,4] x) => (float[n,3] y) <{_W}, int64[2] s = {{-1, 6}}> {{
        T = Transpose <perm = [1, 0]> (W)  h = Gemm <transB = 1> (x, T, b)
        r = Reshape(h, s)  c = Clip(r)  y = MatMul(c, V) }}""",
    "constants": f"""(float[n,4] x) => (float[n,3] y) <{_W}> {{
        k = Constant <value_float = 0.5> ()  h = MatMul(x, W)  g = Add(h, b)
        m = Mul(g, k)  z = Softmax <axis = 1> (m)  y = MatMul(z, V) }}""",
    "conv": f"""(float[n,2,6,6] x) => (float[n,3] y)
        <{_stored("K", 6, 2, 3, 3)}, {_W}> {{
        h = Conv <pads = [1,1,1,1], strides = [2,2]> (x, K, b)  r = Relu(h)
        p = GlobalAveragePool(r)  f = Flatten(p)  y = MatMul(f, V) }}""",
    "if": f"""(float[n,4] x) => (float[n,3] y) <{_W}, bool c = {{1}}> {{
        h = If (c) <then_branch = t () => (float[n,6] p) {{ p = Gemm(x, W, b) }},
                    else_branch = e () => (float[n,6] q) {{ q = MatMul(x, W) }}>
        y = MatMul(h, V) }}""",
    "shapes": f"""(float[n,5,4] x) => (float[n,5,3] y) <{_W}, int64[1] i = {{0}},
        int64[1] d = {{2}}, int64[1] e = {{3}}, int64[1] m = {{-1}}> {{
        h = MatMul(x, W)  s = Shape(h)  a = Gather <axis = 0> (s, i)
        t = Concat <axis = 0> (a, m, d, e)  r = Reshape(h, t)
        o = Transpose <perm = [0, 1, 3, 2]> (r)  u = Shape(h)  v = Reshape(h, u)
        y = MatMul(v, V) }}""",
}
_FUNCTION = """
<domain: "l", opset_import: ["": 17]> f <slope> (a, w) => (o) {
    z = MatMul(a, w)  o = LeakyRelu <alpha: float = @slope> (z) }"""
_CALL = (
    f"(float[n,4] x) => (float[n,3] y) <{_W}>{{ h = l.f <slope = 0.1> (x, W) y = MatMul(h, V) }}"
)


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        number: of the case, for its name.
        model: bytes of the model file.
        data: bytes of the calibration file; empty for made-up inputs.
        suffix: of that file.
        command: inspect or optimize.
    """

    number: int
    model: bytes
    data: bytes
    suffix: str
    command: str


def seeds() -> list[onnx.ModelProto]:
    """The valid models that are mutated; all take ``arrays``."""
    texts = [_HEAD + text for text in MODELS.values()] + [_HEAD + _CALL + _FUNCTION]
    return [onnx.parser.parse_model(text) for text in texts]


def case(seed: int, number: int) -> Case:
    """Case ``number`` of a seed."""
    rng = np.random.default_rng([seed, number])
    models = seeds()
    model = models[int(rng.integers(len(models)))]
    kind = rng.choice(["fields", "fields", "fields", "bytes", "arrays"])
    data, suffix = b"", ".npz"
    if kind == "fields":
        for _ in range(int(rng.integers(1, 4))):
            _mutate_field(model, rng)
    serialized = _serialized(model)
    if kind == "bytes":
        serialized = _mutated_bytes(serialized, rng)
    if kind == "arrays":
        suffix = str(rng.choice([".npz", ".npy"]))
        data = _mutated_bytes(_arrays(model, suffix), rng)
    return Case(number, serialized, data, suffix, str(rng.choice(["inspect", "optimize"])))


def _serialized(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializePartialToString())


def _arrays(model: onnx.ModelProto, suffix: str) -> bytes:
    shape = [d.dim_value or 6 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    stream = io.BytesIO()
    if suffix == ".npz":
        np.savez(stream, x=x)
    else:
        np.save(stream, x)
    return stream.getvalue()


def _mutated_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(changed) + 1))
        changed[at : at + int(rng.integers(4))] = rng.bytes(int(rng.integers(4)))
    return bytes(changed)


_NUMBERS = (0, 1, -1, 2, 3, 5, 7, 64, 255, 2**31 - 1, -(2**31), 2**40, -(2**63), 2**63 - 1)


def _mutate_field(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Change, repeat, drop or exchange one field somewhere below the graph and the functions."""
    edits = [edit for root in (model.graph, *model.functions) for edit in _edits(root, model, rng)]
    edits[int(rng.integers(len(edits)))]()


def _edits(
    message: Message, model: onnx.ModelProto, rng: np.random.Generator
) -> Iterator[Callable[[], Any]]:
    for field, value in message.ListFields():
        name = field.name
        if name in ("doc_string", "raw_data"):
            continue
        # A repeated field has no message value of its own; strings have no "extend".
        if hasattr(value, "extend"):
            yield lambda v=value: v.pop(int(rng.integers(len(v))))
            yield lambda v=value: v.extend([v[int(rng.integers(len(v)))]])
            if field.cpp_type == field.CPPTYPE_MESSAGE:
                for item in value:
                    yield from _edits(item, model, rng)
            else:
                yield lambda v=value, f=field: v.__setitem__(
                    int(rng.integers(len(v))), _scalar(f, model, rng)
                )
        elif field.cpp_type == field.CPPTYPE_MESSAGE:
            yield lambda m=message, n=name: m.ClearField(n)
            yield from _edits(value, model, rng)
        else:
            yield lambda m=message, n=name: m.ClearField(n)
            yield lambda m=message, f=field: setattr(m, f.name, _scalar(f, model, rng))
            if isinstance(message, onnx.AttributeProto):
                yield lambda m=message: setattr(m, "ref_attr_name", "q")


def _scalar(field: Any, model: onnx.ModelProto, rng: np.random.Generator) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
        known = [n.op_type for n in nodes] + [x for n in nodes for x in (*n.input, *n.output)]
        text = str(rng.choice([*known, "", "axis", "value", "pads", "Sequence"]))
        return text.encode() if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return float(rng.choice([0.0, 1.0, -1.0, 1e-42, 3e38, np.inf, np.nan]))
    if field.cpp_type == field.CPPTYPE_ENUM:
        numbers = [value.number for value in field.enum_type.values]
        return int(rng.choice(numbers))
    number = int(rng.choice(np.array(_NUMBERS, object)))
    small = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32)
    return number % 2**31 if small else number


def run(given: Case, folder: Path) -> tuple[int, str]:
    """(exit code, what escapes, empty where all is in order) of one case, in this process."""
    model, data, output = folder / "m.onnx", folder / f"d{given.suffix}", folder / "o.onnx"
    model.write_bytes(given.model)
    words = [given.command, str(model), "--timeout", str(PATIENCE)]
    if given.data:
        data.write_bytes(given.data)
        words += ["-c", str(data)]
    if given.command == "optimize":
        words += [str(output), "--samples", "4", "--batch-size", "4"]
    done = CliRunner().invoke(command_line, words)
    wrong = escaped(done.exit_code, done.stderr, output.exists())
    for path in folder.iterdir():
        path.unlink()
    return done.exit_code, wrong


def escaped(code: int, stderr: str, wrote: bool) -> str:
    """What is not in order about how a command ended; empty where nothing is."""
    if code not in DOCUMENTED:
        return f"exit code {code}: {stderr.strip().splitlines()[-2:]}"
    if "Traceback" in stderr:
        return "a traceback"
    if code and [line.split(": ")[0] for line in stderr.splitlines()[-2:]] != ["error", "hint"]:
        return f"no error and hint: {stderr[-200:]!r}"
    if code and re.search(r"(?<!onnx_)ecp/", stderr):
        return f"a name of our own: {stderr!r}"
    return "an output beside an error" if code and wrote else ""


def batch(seed: int, numbers: range, folder: Path) -> tuple[Counter[str], dict[int, str]]:
    """Codes and escapes of some cases, run in a child process as long as none crashes it."""
    codes, wrong = Counter[str](), dict[int, str]()
    at = numbers.start
    while at < numbers.stop:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _as_child(seed, range(at, numbers.stop), folder, writing)
        os.close(writing)
        for line in os.fdopen(reading, encoding="utf-8", errors="replace"):
            number, code, escape = line.rstrip("\n").split(" ", 2)
            at = int(number) + 1
            codes[code] += 1
            if escape:
                wrong[int(number)] = escape
        _, status = os.waitpid(child, 0)
        if at < numbers.stop:  # the next one took the child with it
            ended = os.waitstatus_to_exitcode(status)
            codes[signal.Signals(-ended).name if ended < 0 else f"left with {ended}"] += 1
            at += 1
    return codes, wrong


def _as_child(seed: int, numbers: range, folder: Path, writing: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        for number in numbers:
            signal.alarm(2 * PATIENCE)  # SIGALRM ends the child where a kernel does not end
            code, wrong = run(case(seed, number), folder)
            os.write(writing, f"{number} {code} {' '.join(wrong.split())[:800]}\n".encode())
    finally:
        os._exit(0)


def main() -> int:
    """Run until the time is over; 1 where anything escaped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first case")
    parser.add_argument("--save", type=Path, help="folder for the files of what escapes")
    asked = parser.parse_args()
    end = time.monotonic() + asked.seconds
    codes, wrong, at = Counter[str](), dict[int, str](), asked.start
    with TemporaryDirectory() as folder:
        while time.monotonic() < end:
            found, escapes = batch(asked.seed, range(at, at + 50), Path(folder))
            codes, wrong, at = codes + found, wrong | escapes, at + 50
            for number, what in escapes.items():
                print(f"case {number}: {what}", flush=True)
                if asked.save:
                    asked.save.mkdir(parents=True, exist_ok=True)
                    given = case(asked.seed, number)
                    (asked.save / f"{asked.seed}_{number}.onnx").write_bytes(given.model)
                    if given.data:
                        target = asked.save / f"{asked.seed}_{number}{given.suffix}"
                        target.write_bytes(given.data)
    print(f"{sum(codes.values())} cases of seed {asked.seed}: {len(wrong)} escaped")
    for code, times in sorted(codes.items()):
        print(f"{code:>12} {times}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
