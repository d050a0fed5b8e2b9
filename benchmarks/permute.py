"""``--permute`` lowers what 2:4 costs: the same pattern, its neighbours chosen.

    python benchmarks/permute.py [network ...]

Every network, pruned to 2:4 by ``ecp-refit`` where the pattern fits, in the order given and
reordered: of all of them some layers read what another layer makes. The claim is that the output
error is no larger with the order changed. tribuo has no layer whose inputs are free and that the
pattern fits: there nothing may change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
from contest import Feeds, compete
from networks import NETWORKS
from outcome import Claim, environment, finish, publish, table
from two_four import ours_where_it_fits


def given_order(model: onnx.ModelProto, feeds: Feeds, sparsity: Any) -> onnx.ModelProto:
    """``ecp-refit`` in the order given."""
    return ours_where_it_fits(model, feeds, sparsity).model


def permuted(model: onnx.ModelProto, feeds: Feeds, sparsity: Any) -> onnx.ModelProto:
    """``ecp-refit`` with another order."""
    return ours_where_it_fits(model, feeds, sparsity, permute=True).model


def claims(found: list[dict[str, Any]]) -> Iterator[Claim]:
    """The error against that of the order given."""
    for given, other in zip(found[::2], found[1::2], strict=True):
        what = f"{given['network']}: error {other['error']:.4g}, as given {given['error']:.4g}"
        yield Claim(what, other["error"] <= given["error"])


def main(names: Sequence[str]) -> int:
    """Measure, publish, judge."""
    found: list[dict[str, Any]] = []
    for name in names or NETWORKS:
        rows = compete(name, {"as given": given_order, "--permute": permuted}, ["2:4"])
        keys = ("network", "method", "accuracy", "dense", "error", "seconds")
        found += [{key: row[key] for key in keys} for row in rows]
        publish("permute", found)
    print(table(found))
    print(environment())
    return finish(claims(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
