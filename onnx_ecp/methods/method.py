"""What a pruning method is: an importance, a compensation, and what both must know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnx_ecp.refit import Gram
from onnx_ecp.statistics import Moments

# Each step needs all that the steps before it need.
NEEDS = ("nothing", "activations", "sensitivities", "gradients")
# What makes good for the removed weights, and what must be known for it.
COMPENSATIONS = {"none": "nothing", "bias": "sensitivities", "refit": "sensitivities"}


@dataclass(frozen=True)
class View:
    """What a method may look at when it ranks the weights of one layer.

    Args:
        weight: (out, in) float64, the weights as they are now.
        moments: of the layer; None where the method needs nothing.
        rng: seeded generator of this layer.
        gram: of the layer's inputs; None where the method does not walk.
        damping: ridge as a share of the mean diagonal of the Gram matrix.
    """

    weight: np.ndarray
    moments: Moments | None
    rng: np.random.Generator
    gram: Gram | None = None
    damping: float = 1e-2

    @property
    def seen(self) -> Moments:
        """The moments of a method that said it needs them."""
        assert self.moments is not None, "the method's `needs` must name what it reads"
        return self.moments

    def per_row(self, x: np.ndarray) -> np.ndarray:
        """(groups, in) values repeated for the rows of W: (out, in)."""
        return np.repeat(x, len(self.weight) // len(x), axis=0)


Importance = Callable[[View], np.ndarray]


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Args:
        importance: from a View to (out, in) float64 >= 0; the smallest goes first.
        compensation: a name in COMPENSATIONS.
        needs: what the importance reads: a name in NEEDS.
        needs_gram: whether it reads the Gram matrix too; costs a walk per stage.
        stages: how many times observe, score, select, compensate are repeated.
        shrinkage: q of ``Moments.shrunk``.
        floor: least density of a layer as a share of the density of all layers.
        in_output_units: whether the importance is the expected squared output error of the removal.
        summary: one line for people, with the source.
    """

    importance: Importance
    compensation: str = "none"
    needs: str = "nothing"
    needs_gram: bool = False
    stages: int = 1
    shrinkage: float = 0.0
    floor: float = 0.0
    in_output_units: bool = False
    summary: str = ""

    def with_parts(
        self, ranking: Method | None, compensation: str | None, stages: int | None
    ) -> Method:
        """This method with another importance, compensation or number of stages (None: its own)."""
        method = self
        if ranking is not None:
            method = replace(
                method,
                importance=ranking.importance,
                needs=ranking.needs,
                needs_gram=ranking.needs_gram,
                in_output_units=ranking.in_output_units,
            )
        return replace(
            method,
            compensation=compensation or method.compensation,
            stages=stages or method.stages,
        )

    @property
    def measures(self) -> str:
        """The name in NEEDS of all that must be measured."""
        return max(self.needs, COMPENSATIONS[self.compensation], key=NEEDS.index)


def bias_shift(weight: np.ndarray, moments: Moments, keep: np.ndarray) -> np.ndarray:
    """Shift (out,) of the bias that makes good for the removed weights, to first order.

    The sum over a row of the single optima db*_ij = W_ij wb_ij / bb_i is the joint optimum of the
    linearised problem for a given mask (docs/method.md, section 1).

    Args:
        weight: (out, in) before removal.
        moments: of the layer.
        keep: (out, in), True where the weight stays.
    """
    return np.asarray((np.where(keep, 0.0, weight) * moments.gain).sum(axis=1))
