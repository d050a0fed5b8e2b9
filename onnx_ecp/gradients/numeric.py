"""Adjoints by central finite differences: no rules needed, 2 * positions * out runs per layer.

    v dy/dz_i  ~  v (y(z + h e_i) - y(z - h e_i)) / (z_i+ - z_i-)

h grows with |z|, else float32 would round a small step beside a large z to none.
The step that was really taken (float32 rounds z + h) is read off the disturbed z itself. This is
the oracle of the reverse graph and the way out for operators that have no rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from onnx_ecp.graph.operators import attributes_of, find
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.session import Session

# In units of max(|z|, 1): a small step crosses few kinks; a smooth network takes a larger one.
_AMONG_KINKS, _SMOOTH = 1e-3, 1e-2


def step_for(nodes: Iterable[onnx.NodeProto]) -> float:
    """The step h that suits a network of these operators."""
    kinked = (find(n.domain, n.op_type).kinked(attributes_of(n)) for n in nodes)
    return _AMONG_KINKS if any(kinked) else _SMOOTH


def numeric_adjoint(
    session: Session,
    feeds: Mapping[str, np.ndarray],
    shift: str,
    target: str,
    seeds: Mapping[str, np.ndarray],
    *,
    samples: int,
    step: float,
) -> np.ndarray:
    """The adjoint (P, *shape of z) of one pre-activation, float64.

    Args:
        session: forward session with the seeded outputs and z among its outputs.
        feeds: all its inputs.
        shift: name of the input that is added to z.
        target: name of z.
        seeds: by output name, (P, *shape of y).
        samples: batch size; samples are disturbed together where z has the batch axis in front.
        step: h, in units of max(|z|, 1).
    """
    names = [*seeds, target]
    z = session.run(feeds, [target])[target]
    together = z.shape[:1] == (samples,) and all(s.shape[1:2] == (samples,) for s in seeds.values())
    outer = z.shape[0] if together else 1
    inner = z.shape[1:] if together else z.shape
    probes = next(iter(seeds.values())).shape[0]
    steps = (step * np.maximum(np.abs(z), 1)).astype(z.dtype)
    adjoint = np.zeros((probes, outer, *inner))
    for index in np.ndindex(*inner):
        check_deadline()
        at = (slice(None), *index) if together else index
        ends = []
        for sign in (1.0, -1.0):
            disturbed = np.zeros_like(z)
            disturbed[at] = sign * steps[at]
            ends.append(session.run({**feeds, shift: feeds[shift] + disturbed}, names))
        plus, minus = ends
        taken = plus[target][at].astype(np.float64) - minus[target][at]
        product = sum(
            (s.astype(np.float64) * (plus[n].astype(np.float64) - minus[n]))
            .reshape(probes, outer, -1)
            .sum(axis=2)
            for n, s in seeds.items()
        )
        adjoint[(slice(None), slice(None), *index)] = product / taken
    return adjoint.reshape(probes, *z.shape)
