"""What the removal of each single weight does to the outputs: measured, by running the network.

There is no expansion in it, so it is what first- and second-order importances approximate. It takes
a forward pass for every weight.
"""

from __future__ import annotations

import numpy as np

from onnx_ecp.errors import UsageError
from onnx_ecp.evaluation.compare import DeviationSums, deviation_sums, overall
from onnx_ecp.layers import Layer
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.progress import Progress, silent
from onnx_ecp.statistics.layerwise import Network, matrix
from onnx_ecp.statistics.moments import Moments
from onnx_ecp.statistics.observer import State

# Forward passes of all training samples, one for each weight.
MOST = 20_000


class Effects:
    """The network with one weight after the other removed.

    Args:
        network: what is pruned.
        state: where it stands.
        progress: called after every weight.

    Raises:
        UsageError: there are more weights than MOST, or no output that could be compared.
    """

    def __init__(self, network: Network, state: State, progress: Progress = silent) -> None:
        self._network, self._state, self._progress = network, state, progress
        tensors = {layer.weight.tensor for layer in network.layers}
        self._number = sum(int(np.count_nonzero(state.keep[name])) for name in tensors)
        if self._number > MOST:
            raise UsageError(
                f"--method nonlinear runs the network once for every weight: {self._number:,} are "
                f"more than {MOST:,}.",
                hint="Choose some layers with --include, or take --method ecp, which approximates "
                "it from one backward pass.",
            )
        if not network.observer.outputs:
            raise UsageError(
                "--method nonlinear needs a floating-point output that depends on the layers.",
                hint="Methods that look forward need none: --method wanda.",
            )
        self._batches = list(network.train.batches(network.size))
        self._reference = [network.observer.predict(state, batch) for batch in self._batches]
        self._done = 0

    def of(self, layer: Layer, moments: Moments) -> np.ndarray:
        """(out, in): mean squared change of the outputs, in units of their spread.

        It is 0 where there is no weight. The weight's mean signal, ``W_ij E[a_j]`` over rows, goes
        to the bias.

        Args:
            layer: whose weights are removed.
            moments: of its inputs.
        """
        state, tensor = self._state, layer.weight.tensor
        weight, keep = matrix(layer, state), state.keep[tensor]
        means = moments.centre + moments.a / moments.rows
        rows = len(weight) // len(means)
        found = np.zeros(weight.shape)
        for i, j in np.argwhere(keep & (weight != 0)):
            check_deadline()
            one, shift = weight.copy(), state.shifts[layer.name].copy()
            one[i, j] = 0.0
            shift[i] += weight[i, j] * means[i // rows, j]
            stored = layer.weight.unmatrix(one).astype(state.weights[tensor].dtype)
            found[i, j] = self._change(state.with_layer(layer, stored, shift))
            self._done += 1
            self._progress("weights", self._done, self._number)
        return found

    def _change(self, state: State) -> float:
        observer, sums = self._network.observer, dict[str, DeviationSums]()
        for batch, wanted in zip(self._batches, self._reference, strict=True):
            seen = observer.predict(state, batch)
            for name, y in wanted.items():
                axis = observer.measure.spreads[name].axis
                a, b = np.atleast_1d(y), np.atleast_1d(seen[name])
                part = deviation_sums(a, b, 0, batch.samples, axis)
                sums[name] = sums[name] + part if name in sums else part
        return float(overall(sums, observer.measure)) ** 2
