"""In what unit the gap of one input is told.

With f the share in which a column counts over its variance and the elements that a sample has of it
(``Measure.per_element``), the gap of an input is

    sqrt(sum over the elements of all outputs of f (b - a)^2)

whose root mean square over samples is the relative error of ``compare``: neither the unit of a
column nor its offset counts, and a network of constant outputs has gaps about 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.evaluation.compare import axes_of, outputs_of
from onnx_ecp.graph import Model
from onnx_ecp.statistics.columns import Measure, Spread


@dataclass(frozen=True)
class Units:
    """What differences of outputs are multiplied by, and what constant outputs would be.

    Args:
        factors: by output, in a shape that broadcasts with it; 0 for columns that do not count.
        centres: by output, the same shape, the values of a network of constant outputs.
        measure: the factors are of; None for the plain L2 norm.
    """

    factors: Mapping[str, np.ndarray]
    centres: Mapping[str, np.ndarray]
    measure: Measure | None = None

    @staticmethod
    def of(measure: Measure) -> Units:
        """Of every column its own spread; where none varies, its size, about zero."""
        centres = {
            name: spread.along_axis(spread.mean if measure.centred else np.zeros(len(spread.mean)))
            for name, spread in measure.spreads.items()
        }
        return Units(measure.factors(), centres, measure)

    def factor(self, name: str) -> np.ndarray:
        """Of one output."""
        return self.factors.get(name, np.ones(1))

    def centre(self, name: str) -> np.ndarray:
        """Of one output."""
        return self.centres.get(name, np.zeros(1))


# The L2 norm of outputs as they are.
PLAIN = Units({}, {})


def units_over(
    model: Model,
    data: Calibration,
    weights: Mapping[str, float] | None,
    *,
    provider: str,
    threads: int | None,
    batch_size: int,
) -> Units:
    """From the spread of a model's outputs over samples.

    Args:
        model: the original.
        data: the samples.
        weights: of outputs and columns; see ``Measure.of``.
        provider: execution provider.
        threads: threads within an operator.
        batch_size: samples a run.

    Raises:
        UsageError: a weight names no output or column.
    """
    spreads: dict[str, Spread] = {}
    axes: dict[str, int | None] = {}
    for batch, (outputs,) in outputs_of([model], data.batches(batch_size), provider, threads):
        axes = axes or axes_of(model, batch, outputs)
        for name, y in outputs.items():
            if y.dtype.kind == "f":
                part = Spread.of(y, axes[name], batch.samples)
                spreads[name] = spreads[name] + part if name in spreads else part
    return Units.of(Measure.of(spreads, weights))
