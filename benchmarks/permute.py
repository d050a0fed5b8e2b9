"""``--permute`` lowers what 2:4 costs: the same pattern, its neighbours chosen.

    python benchmarks/permute.py

Every network with a layer whose inputs another layer of the file makes, pruned to 2:4 by
``ecp-refit`` where the pattern fits, in the order given and reordered. The claim is that the output
error is no larger with the order changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import onnx
from contest import Contestant, Feeds, compete
from networks import NETWORKS
from outcome import Claim, environment, finish, publish, table
from two_four import ours_where_it_fits


def permuted(seen: list[int]) -> Contestant:
    """``ecp-refit`` with another order; how many layers it gained for is added to ``seen``."""

    def prune(model: onnx.ModelProto, feeds: Feeds, sparsity: Any) -> onnx.ModelProto:
        made = ours_where_it_fits(model, feeds, sparsity, permute=True)
        seen.append(sum("inputs reordered" in layer.note for layer in made.report.layers))
        return made.model

    return prune


def given_order(model: onnx.ModelProto, feeds: Feeds, sparsity: Any) -> onnx.ModelProto:
    """``ecp-refit`` in the order given."""
    return ours_where_it_fits(model, feeds, sparsity).model


def rows(name: str) -> Iterator[dict[str, Any]]:
    """In the order given and reordered; nothing where no order is free."""
    reordered: list[int] = []
    contestants = {"as given": given_order, "--permute": permuted(reordered)}
    found = list(compete(name, contestants, ["2:4"]))
    if reordered[0]:
        for row in found:
            yield {"network": name, "order": row["method"], "layers reordered": reordered[0]} | {
                key: row[key] for key in ("accuracy", "dense", "error", "seconds")
            }


def claims(found: list[dict[str, Any]]) -> Iterator[Claim]:
    """The error against that of the order given."""
    for given, other in zip(found[::2], found[1::2], strict=True):
        what = f"{given['network']}: error {other['error']:.4g}, as given {given['error']:.4g}"
        yield Claim(what, other["error"] <= given["error"])


def main() -> int:
    """Measure, publish, judge."""
    found = [row for name in NETWORKS for row in rows(name)]
    publish("permute", found)
    print(table(found))
    print(environment())
    return finish(claims(found))


if __name__ == "__main__":
    sys.exit(main())
