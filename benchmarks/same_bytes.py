"""A refactoring changes no byte: the sha256 of every file that ``optimize`` writes, recorded.

    python benchmarks/same_bytes.py --record FILE.json    # before: the code as it is
    python benchmarks/same_bytes.py --check FILE.json     # after: exit code 1 where a file differs
    python benchmarks/same_bytes.py --check FILE.json --only 'method|units'

Every method, both granularities, all formats, patterns, targets, fine-tuning, tokens, convolutions,
local functions and external data, on the networks of ``models/`` and on small ones of random
weights. Only the public interface is used, so that this runs wherever the modules have gone. Seed,
threads, batch size and memory are fixed: the same bytes come out on one machine with the same
versions of everything else, so both runs belong there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import helper, numpy_helper

import onnx_ecp

MODELS = Path(__file__).resolve().parent.parent / "models"
PACKAGE = Path(onnx_ecp.__file__).parent
SAMPLES = 96
HEADER = '<ir_version: 8, opset_import: ["": 17, "local": 1, "com.microsoft": 1]> net '

# Small networks: random values for what stands in <...>, random inputs for what stands in (...).
NETWORKS = {
    "convolutions": """(float[n,2,8,8] x) => (float[n,4] y)
        <float[8,2,3,3] W, float[8] b, float[8] scale, float[8] offset, float[8] mean,
         float[8] variance, float[12,8,1,1] W2, float[8,12,3,3] W3, float[8] b3,
         float[8,2,1,1] W4, float[8,4,3,3] W5, float[8] b5, float[4,8] W6, float[4] b6> {
            h = Conv<pads=[1,1,1,1]>(x, W, b)
            m = BatchNormalization(h, scale, offset, mean, variance)  r = Relu(m)
            p = Conv<strides=[2,2]>(r, W2)  q = Relu(p)  d = Conv<pads=[1,1,1,1]>(q, W3, b3)
            e = Conv<strides=[2,2]>(x, W4)  a = Add(d, e)  g = Conv<group=2>(a, W5, b5)
            t = Relu(g)  u = GlobalAveragePool(t)  f = Flatten(u)
            y = Gemm<transB=1>(f, W6, b6)
        }""",
    "transformer": """(float[n,6,16] x) => (float[n,5] y)
        <float[16] scale, float[16] offset, float[16,16] Q, float[16] bq, float[16,16] K,
         float[16] bk, float[16,16] V, float[16] bv, float[16,16] O, float[16] bo,
         float[16,32] U, float[32] bu, float[32,16] D, float[16] bd, float[16,5] C, float[5] bc> {
            heads = Constant<value_ints=[0,0,2,8]>()  flat = Constant<value_ints=[0,0,16]>()
            eighth = Constant<value_float=0.35355>()
            x1 = LayerNormalization(x, scale, offset)
            q0 = MatMul(x1, Q)  q1 = Add(q0, bq)  q2 = Reshape(q1, heads)
            k0 = MatMul(x1, K)  k1 = Add(k0, bk)  k2 = Reshape(k1, heads)
            v0 = MatMul(x1, V)  v1 = Add(v0, bv)  v2 = Reshape(v1, heads)
            q = Transpose<perm=[0,2,1,3]>(q2)  k = Transpose<perm=[0,2,3,1]>(k2)
            v = Transpose<perm=[0,2,1,3]>(v2)
            s = MatMul(q, k)  t = Mul(s, eighth)  p = Softmax<axis=-1>(t)  c0 = MatMul(p, v)
            c1 = Transpose<perm=[0,2,1,3]>(c0)  c = Reshape(c1, flat)
            o0 = MatMul(c, O)  o = Add(o0, bo)  x2 = Add(x, o)
            u0 = MatMul(x2, U)  u1 = Add(u0, bu)  u2 = Sigmoid(u1)  u = Mul(u1, u2)
            d0 = MatMul(u, D)  d = Add(d0, bd)  x3 = Add(x2, d)
            m = ReduceMean<axes=[1], keepdims=0>(x3)  y0 = MatMul(m, C)  y = Add(y0, bc)
        }""",
    "functions": """(float[n,8] x) => (float[n,4] y)
        <float[8,16] W, float[16] b, float[16,16] W2, float[16] b2, float[16,4] W3, float[4] b3> {
            h = local.Dense(x, W, b)  r = Tanh(h)  c = Constant<value = bool {1}>()
            g = If (c) <then_branch = a () => (float[n,16] p) { p = local.Dense(r, W2, b2) },
                        else_branch = e () => (float[n,16] q) { q = Identity(r) }>
            s = Relu(g)  y = local.Dense(s, W3, b3)
        }
        <domain: "local", opset_import: ["": 17]>
        Dense (x, w, b) => (y) { p = MatMul(x, w)  y = Add(p, b) }""",
    "fused": """(float[n,4,8] x) => (float[n,3] y)
        <float[8,24] W, float[24] b, float[8,12] W2, float[12,3] W3, float[3] b3> {
            a = com.microsoft.Attention<num_heads=2>(x, W, b)
            h = com.microsoft.FusedMatMul<alpha=0.5>(a, W2)  r = Relu(h)
            m = ReduceMean<axes=[1], keepdims=0>(r)
            y = com.microsoft.FusedGemm<activation="Tanh">(m, W3, b3)
        }""",
    "tied": """(float[n,8] x, float[n,8] z) => (float[n,3] y, float[n,8] t)
        <float[8,8] W, float[8] b, float[3,8] W2, float[3] b2> {
            h = Gemm(x, W, b)  r = Tanh(h)  g = Gemm(r, W, b)  s = Add(g, z)  t = Tanh(s)
            y = Gemm<transB=1>(t, W2, b2)
        }""",
    "half": """(float16[n,8] x) => (float16[n,3] y)
        <float16[16,8] W, float16[16] b, float16[3,16] W2> {
            h = Gemm<transB=1>(x, W, b)  r = Relu(h)  y = Gemm<transB=1>(r, W2)
        }""",
}

# What all cases have, unless they say otherwise. {out}, {inputs} and {models} are folders.
EVERY: dict[str, Any] = {
    "sparsity": 0.6,
    "masks": "{out}/masks.npz",
    "samples": 128,
    "batch_size": 32,
    "seed": 3,
    "threads": 1,
    "max_memory": "1G",
}
LABELLED = {
    "calibration": "{models}/digits-test.npz",
    "labels": "{models}/digits-test.npz",
}
UNITS = {"granularity": "unit", "sparsity": 0.4}
SPEEDUP = {"sparsity": None, "speedup": 2}


@dataclass(frozen=True)
class Case:
    """One optimisation.

    Args:
        network: one of ``NETWORKS`` or ``models/``, or ``external``: digits with external data.
        choices: options by their names in Python, on top of ``EVERY``; None leaves one out.
        way: ``path``: a file to a file, in Python; ``returned``: a file and arrays to a proto;
            ``proto``: a proto and arrays to a proto; ``command``: on the command line.
    """

    network: str
    choices: Mapping[str, Any]
    way: str = "path"


# What each method is given beside its name.
OF_METHOD: dict[str, dict[str, Any]] = {"ecp-refit": {"stages": 4}}
CASES = {
    **{
        f"method {name}": Case("digits", {"method": name, **OF_METHOD.get(name, {})})
        for name in onnx_ecp.METHODS
    },
    **{
        f"format {name}": Case("heat", {"method": "ecp", "format": name})
        for name in ("dense", "sparse", "packed")
    },
    "units": Case("digits", {**UNITS, "stages": 2}),
    "units, magnitude": Case("heat", {**UNITS, "method": "magnitude"}),
    "units, speedup": Case("convolutions", {**UNITS, **SPEEDUP, "method": "ecp"}),
    "units, speedup, flops": Case(
        "convolutions", {**UNITS, **SPEEDUP, "cost": "flops", "stages": 2}
    ),
    "units in multiples": Case(
        "digits", {**UNITS, "method": "ecp", "unit_multiple": 16, "format": "packed"}
    ),
    "units of heads": Case("transformer", {**UNITS, "stages": 2}),
    "units of heads, turned": Case("transformer", {**UNITS, "stages": 2, "masks": None}),
    "units, fine-tuned": Case(
        "transformer", {**UNITS, "method": "magnitude", "stages": 2, "finetune_steps": 20}
    ),
    "2:4": Case("digits", {"sparsity": "2:4", "stages": 2}),
    "2:4, permuted": Case("digits", {"sparsity": "2:4", "permute": True, "masks": None}),
    "1:4, sparsegpt": Case("heat", {"sparsity": "1:4", "method": "sparsegpt"}),
    "target, error": Case("heat", {"sparsity": None, "max_error": 0.1, "stages": 4}),
    "target, error, units": Case(
        "heat", {**UNITS, "sparsity": None, "max_error": 0.2, "stages": 4}
    ),
    "target, accuracy": Case(
        "digits", {**LABELLED, "sparsity": None, "max_accuracy_drop": 5, "method": "ecp"}
    ),
    "loss of labels": Case("digits", {**LABELLED, "method": "woodfisher", "blocks": "layer"}),
    "fine-tuned": Case("digits", {"method": "magnitude", "sparsity": 0.9, "finetune_steps": 20}),
    "fine-tuned, kl": Case("digits", {"method": "ecp", "metric": "kl", "finetune_steps": 20}),
    "kl": Case("digits", {"metric": "kl", "stages": 2, "probes": 3}),
    "scope layer": Case("heat", {"scope": "layer", "method": "obs"}),
    "layer sparsity": Case(
        "digits", {"layer_sparsity": {"layers.0": 0.9, "layers.4": "2:4"}, "method": "flap"}
    ),
    "layers excluded": Case("digits", {"exclude": ["layers.4"], "method": "obd", "sparsity": 0.9}),
    "parts combined": Case(
        "heat", {"method": "magnitude", "compensation": "refit", "stages": 3, "damping": 0.02}
    ),
    "tokens": Case("transformer", {"stages": 4}),
    "tokens, ecp, reduced": Case("transformer", {"method": "ecp", "positions": "reduce"}),
    "tokens, obc": Case("transformer", {"method": "obc", "sparsity": 0.5}),
    "tokens, sums in the graph": Case("transformer", {"stages": 2, "statistics": "graph"}),
    "convolutions": Case("convolutions", {"stages": 3}),
    "convolutions, ecp": Case("convolutions", {"method": "ecp", "format": "sparse"}),
    "functions": Case("functions", {"stages": 2}),
    "functions, numeric": Case("functions", {"method": "ecp", "gradients": "numeric"}),
    "fused": Case("fused", {"stages": 2}),
    "tied": Case("tied", {"stages": 2}),
    "half precision": Case("half", {"stages": 2}),
    "external data": Case("external", {"stages": 2, "cleanup": False}),
    "external data, clean-up": Case("external", {"method": "ecp", "sparsity": 0.95}),
    "external data, excluded": Case("external", {"method": "wanda", "exclude": ["layers.2"]}),
    "external data, sparse": Case("external", {"method": "wanda", "format": "sparse"}),
    "external data, returned": Case("external", {"method": "obs", "cleanup": False}, "returned"),
    "external data, units": Case("external", {**UNITS, "method": "ecp"}),
    "clean-up, smaller": Case(
        "digits", {"method": "ecp", "sparsity": 0.95, "unread_inputs": "smaller"}
    ),
    "no clean-up": Case("digits", {"method": "ecp", "sparsity": 0.95, "cleanup": False}),
    "masks applied": Case(
        "digits", {"sparsity": None, "apply_masks": "{inputs}/keep.npz", "stages": 2}
    ),
    "made-up inputs": Case("bare", {"method": "ecp"}),
    "proto": Case("transformer", {"method": "ecp"}, "proto"),
    "command": Case(
        "digits", {"stages": 2, "format": "packed", "exclude": ["layers.4"]}, "command"
    ),
    "command, units": Case("heat", {**UNITS, "method": "flap"}, "command"),
}

Record = dict[str, str]


def main() -> int:
    """Run the cases, then write what came out or compare it."""
    asked = arguments()
    names = [name for name in CASES if re.search(asked.only, name)]
    print(f"{len(names)} cases of {PACKAGE}", file=sys.stderr, flush=True)
    found: Record = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        write_inputs(inputs)
        for name in names:
            found |= attempted(name, inputs)
    if asked.check is not None:
        return compared(found, json.loads(asked.check.read_text()), asked.only)
    return recorded(found, asked.record)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="write the record there")
    what.add_argument("--check", type=Path, metavar="FILE", help="compare with the record there")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    asked = parser.parse_args()
    if not any(re.search(asked.only, name) for name in CASES):
        parser.error(f"no case matches {asked.only!r}")
    return asked


def recorded(found: Record, path: Path) -> int:
    """Write the record; exit code 1, and no file, where a case failed."""
    failed = [key for key in found if key.endswith("/failed")]
    if failed:
        print(f"not recorded, {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def compared(found: Record, known: Record, only: str) -> int:
    """List the files that differ from those of a record; exit code 1 if there are any."""
    before = {key: digest for key, digest in known.items() if re.search(only, case_of(key))}
    keys = sorted(found.keys() | before.keys())
    changed = [key for key in keys if found.get(key) != before.get(key)]
    for key in changed:
        print(f"DIFFERS {key}: {before.get(key, 'none')} -> {found.get(key, 'none')}")
    cases, differing = ({case_of(key) for key in some} for some in (keys, changed))
    print(f"{len(differing)} of {len(cases)} cases differ, {len(changed)} of {len(keys)} files")
    return 1 if changed else 0


def case_of(key: str) -> str:
    """The case of a line of the record."""
    return key.partition("/")[0]


def attempted(name: str, inputs: Path) -> Record:
    """The files of a case as ``case/file: sha256``, printed too; what went wrong, if it failed."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run(CASES[name], inputs, Path(folder))
        except Exception as error:  # a later case may still tell something
            found = {"failed": f"{type(error).__name__}: {error}"}
    print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    record = {f"{name}/{file}": digest for file, digest in found.items()}
    for key, digest in record.items():
        print(f"{key}  {digest}", flush=True)
    return record


def run(case: Case, inputs: Path, out: Path) -> Record:
    """Optimise, and give the sha256 of every file that was written, by its name."""
    choices = chosen(case, inputs, out)
    model = (MODELS if case.network in ("digits", "heat") else inputs) / f"{case.network}.onnx"
    calibration = choices.pop("calibration", None)
    returned: Record = {}
    if case.way == "command":
        by_command(model, calibration, out / "out.onnx", choices)
    elif case.way == "path":
        onnx_ecp.optimize(model, calibration, output=out / "out.onnx", **choices)
    else:
        given = onnx.load(model) if case.way == "proto" else model
        feeds = dict(np.load(model.with_suffix(".npz")))
        result = onnx_ecp.optimize(given, feeds, **choices)
        returned = {"returned": sha256(result.model.SerializeToString(deterministic=True))}
    files = sorted(path for path in out.rglob("*") if path.is_file())
    written = {str(path.relative_to(out)): sha256(path.read_bytes()) for path in files}
    return returned | written


def chosen(case: Case, inputs: Path, out: Path) -> dict[str, Any]:
    """The options of a case, with folders put in."""
    folders = {"inputs": inputs, "out": out, "models": MODELS}
    return {
        name: value.format(**folders) if isinstance(value, str) else value
        for name, value in {**EVERY, **case.choices}.items()
        if value is not None
    }


def by_command(model: Path, calibration: str | None, output: Path, choices: dict[str, Any]) -> None:
    """Run ``onnx-ecp optimize`` of the package that is imported here.

    Raises:
        RuntimeError: it ended with another code than 0.
    """
    words = ["optimize", str(model), str(output), "--quiet"]
    for name, value in {"calibration": calibration, **choices}.items():
        for one in value if isinstance(value, list) else [value]:
            words += [] if one is None else [f"--{name.replace('_', '-')}", str(one)]
    command = [sys.executable, "-m", "onnx_ecp", *words]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_inputs(folder: Path) -> None:
    """Write what the cases read beside ``models/``."""
    for name in NETWORKS:
        model = network(name)
        onnx.save(model, folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **samples(model))
    onnx.save(network("convolutions"), folder / "bare.onnx")  # no inputs beside it
    digits = onnx.load(MODELS / "digits.onnx")
    np.savez(folder / "keep.npz", **larger_half(digits))
    np.savez(folder / "external.npz", **np.load(MODELS / "digits.npz"))
    outside = {"save_as_external_data": True, "location": "external.data"}
    onnx.save(digits, folder / "external.onnx", **outside)


def network(name: str) -> onnx.ModelProto:
    """A small network with random values; what the text declares inside <...> is stored."""
    rng = np.random.default_rng(1)
    model = onnx.parser.parse_model(HEADER + NETWORKS[name])
    for value in model.graph.value_info:
        shape, dtype = described(value)
        scale = np.sqrt(np.prod(shape[1:]))
        array = (rng.standard_normal(shape) / scale).astype(dtype)
        array = abs(array) if value.name == "variance" else array
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
    model.graph.ClearField("value_info")
    onnx.checker.check_model(model)
    return model


def samples(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random inputs."""
    rng = np.random.default_rng(2)
    found = {}
    for value in model.graph.input:
        shape, dtype = described(value)
        found[value.name] = rng.standard_normal((SAMPLES, *shape[1:])).astype(dtype)
    return found


def described(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], np.dtype]:
    """Shape, 0 where it is free, and type."""
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    return shape, helper.tensor_dtype_to_np_dtype(kind.elem_type)


def larger_half(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Keep masks: the larger half of every matrix."""
    arrays = {t.name: np.abs(numpy_helper.to_array(t)) for t in model.graph.initializer}
    return {name: x >= np.median(x) for name, x in arrays.items() if x.ndim == 2}


if __name__ == "__main__":
    sys.exit(main())
