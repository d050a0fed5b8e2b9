"""2:4 by ``ecp-refit`` is closer to the original than others', no less accurate, and accepted.

Every network is pruned where 2:4 fits, that is where 4 divides the reduction axis. Polygraphy's
``surgeon prune`` does it "without regard for accuracy"; its ``inspect sparsity`` is the judge.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from contest import Contestant, Feeds, compete, copied, not_behind, onnxsim_pruning
from networks import NETWORKS
from outcome import Claim, finish, publish, table

import onnx_ecp
from onnx_ecp.api.inspect import inspect
from onnx_ecp.api.optimize import Result

POLYGRAPHY = Path(sys.executable).with_name("polygraphy")


def main() -> int:
    contestants: dict[str, Contestant] = {
        "onnxsim magnitude": where_it_fits(onnxsim_pruning("apply_magnitude_pruning")),
        "onnxsim Wanda": where_it_fits(onnxsim_pruning("apply_wanda_pruning")),
        "onnxsim SparseGPT": where_it_fits(onnxsim_pruning("apply_sparsegpt_pruning")),
        "ecp-refit": lambda *given: ours_where_it_fits(*given).model,
    }
    if POLYGRAPHY.exists():
        contestants = {"polygraphy": polygraphy_prune} | contestants
    else:
        print("polygraphy is not installed: compared without it, and nothing is inspected.")
    rows, claims = [], []
    for name in NETWORKS:
        found = list(compete(name, contestants, ["2:4"]))
        rows += found
        claims += ahead(name, found)
        if POLYGRAPHY.exists():
            claims.append(accepted(name))
    publish("two_four", rows)
    print(table([narrow(row) for row in rows]))
    return finish(claims)


def narrow(row: dict[str, Any]) -> dict[str, Any]:
    """What a reader wants to see."""
    keys = ("network", "dense", "method", "zeros", "accuracy", "error", "seconds")
    return {key: row[key] for key in keys}


def ahead(name: str, rows: list[dict[str, Any]]) -> Iterator[Claim]:
    """Accuracy and error against the best of the others."""
    mine, peers = rows[-1], rows[:-1]
    yield not_behind(name, mine, peers)
    best = min(peers, key=lambda row: row["error"])
    text = f"{name}: error {mine['error']:.4g}, {best['method']} {best['error']:.4g}"
    yield Claim(text, mine["error"] <= best["error"])


def unfit(model: onnx.ModelProto) -> list[str]:
    """Names of the layers that 2:4 does not fit."""
    return [layer.name for layer in inspect(model).layers if layer.two_four]


def ours_where_it_fits(
    model: onnx.ModelProto, feeds: Feeds, sparsity: Any, **choices: Any
) -> Result:
    """``ecp-refit`` with the other layers excluded."""
    patterns = [f"^{re.escape(name)}$" for name in unfit(model)]
    return onnx_ecp.optimize(model, feeds, sparsity=sparsity, exclude=patterns, **choices)


def where_it_fits(prune: Contestant) -> Contestant:
    """A contestant that prunes where 2:4 does not fit, too: there the weights are put back."""

    def restored(model: onnx.ModelProto, feeds: Feeds, sparsity: Any) -> onnx.ModelProto:
        pruned = prune(model, feeds, sparsity)
        names = set(unfit(model))
        # onnxsim gives pruned weights new names; those of the layers stay.
        before, after = (
            {layer.name: layer.tensor for layer in inspect(m).layers} for m in (model, pruned)
        )
        stored = {t.name: t for t in pruned.graph.initializer}
        original = {t.name: t for t in model.graph.initializer}
        for name in names:
            stored[after[name]].CopyFrom(original[before[name]])
            stored[after[name]].name = after[name]
        return pruned

    return restored


def polygraphy_prune(model: onnx.ModelProto, feeds: Feeds, sparsity: Any) -> onnx.ModelProto:
    """``polygraphy surgeon prune``."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        onnx.save(copied(model), source)
        polygraphy("surgeon", "prune", str(source), "-o", str(target))
        return onnx.load(target)


def accepted(name: str) -> Claim:
    """Whether ``polygraphy inspect sparsity`` finds the pattern in every tensor it looks at."""
    network = NETWORKS[name]
    model = onnx.load(network.path)
    inputs, _ = network.digits("train", 64)
    pruned = ours_where_it_fits(model, inputs, "2:4").model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.onnx")
        onnx.save(pruned, path)
        said = polygraphy("inspect", "sparsity", str(path))
    sparse, dense = said.count("Found sparse tensor"), said.count("Found non-sparse tensor")
    text = f"{name}: polygraphy inspect sparsity: {sparse} sparse tensors, {dense} others"
    return Claim(text, sparse > 0 and dense == 0)


def polygraphy(*arguments: str) -> str:
    """Run the tool and return what it says."""
    done = subprocess.run([POLYGRAPHY, *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
