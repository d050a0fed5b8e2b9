"""Third-party models: every Gemm and MatMul is named, and each model is pruned or refused rightly.

``inspect`` must account for every Gemm, MatMul and Conv, in branches too; ``optimize`` at 0.5 must
give a model that ONNX Runtime loads, with inputs and outputs byte for byte unchanged, or say why
not. Networks on digits are calibrated on training digits, the others on made-up inputs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from networks import NETWORKS, SHARED
from outcome import Claim, finish, publish, table

import onnx_ecp
from onnx_ecp.api.inspect import inspect
from onnx_ecp.errors import OnnxEcpError
from onnx_ecp.report.inspection import Inspection

AFFINE = ("Gemm", "MatMul", "Conv")
SPARSITY = 0.5
# Models that cannot be pruned, and what the refusal must say.
REFUSED = {"real_silero_vad_ifless.onnx": "of If"}


def main() -> int:
    rows, claims = [], []
    for path in sorted((SHARED / "models").glob("real_*.onnx")):
        found = inspect(path)
        row: dict[str, Any] = {
            "model": path.stem.removeprefix("real_"),
            "affine nodes": len(list(affine_nodes(onnx.load(path).graph))),
            "prunable": len(found.layers),
            "skipped": len(found.skips),
            "weights": found.weights,
        }
        claims.append(
            Claim(f"{path.name}: inspect names every affine node", names_all(path, found))
        )
        outcome, claim = pruned(path)
        rows.append(row | outcome)
        claims.append(claim)
    publish("real_models", rows)
    print(table(rows))
    return finish(claims)


def affine_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every Gemm, MatMul and Conv, those in branches and loop bodies included."""
    for node in graph.node:
        if node.op_type in AFFINE:
            yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from affine_nodes(attribute.g)


def names_all(path: Path, found: Inspection) -> bool:
    """Whether every affine node is a layer or a skip with a reason."""
    named = [layer.name for layer in found.layers] + [s.name for s in found.skips if s.reason]
    last = {name.rsplit("_branch/", 1)[-1] for name in named}
    nodes = [n.name or n.output[0] for n in affine_nodes(onnx.load(path).graph)]
    return len(named) == len(nodes) and last >= set(nodes)


def pruned(path: Path) -> tuple[dict[str, Any], Claim]:
    """What ``optimize`` made of a model."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, path.name)
        try:
            report = onnx_ecp.optimize(
                path, calibration(path), sparsity=SPARSITY, output=output
            ).report
        except OnnxEcpError as error:
            row = {"sparsity": "", "error": "", "outcome": f"exit {error.exit_code}"}
            expected = REFUSED.get(path.name)
            right = error.exit_code == 5 and expected is not None and expected in error.message
            claim = Claim(f"{path.name}: refused: {error.message[:90]}...", right)
        else:
            assert report.gap is not None, "optimize compares"
            row = {"sparsity": report.sparsity, "error": report.gap.relative_error}
            row["outcome"] = "pruned"
            claim = Claim(
                f"{path.name}: pruned, loads, inputs and outputs unchanged",
                path.name not in REFUSED and loads_unchanged(path, output),
            )
    return row | {"seconds": time.monotonic() - began}, claim


def calibration(path: Path) -> dict[str, Any] | None:
    """Training digits where they fit, else None."""
    for network in NETWORKS.values():
        if network.file == path.name:
            return network.digits("train", network.samples)[0]
    return None


def loads_unchanged(before: Path, after: Path) -> bool:
    """Whether ONNX Runtime loads the result and its signature is the original's.

    Weights that are listed among the inputs, as old exporters do, may shrink.
    """
    onnxruntime.InferenceSession(str(after), providers=["CPUExecutionProvider"])
    a, b = onnx.load(before).graph, onnx.load(after).graph
    return inputs(a) == inputs(b) and list(a.output) == list(b.output)


def inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """What a caller must feed."""
    stored = {tensor.name for tensor in graph.initializer}
    return [x for x in graph.input if x.name not in stored]


if __name__ == "__main__":
    sys.exit(main())
