"""Seeds: which directions of the output the sensitivities are measured in, and in what metric.

With seeds R (one row per probe) the sensitivity of a pre-activation is ``s_i = sum_p (R_p J_i)^2``.

- ``l2``: R is diagonal, every column of the outputs in units of its own spread, so that s_i is
  what the error of ``statistics.columns`` says of it.
- ``l2-raw``: R = identity, so s_i = sum_k J_ki^2, the squared error of the outputs as they are
  (ECP). Each of several outputs is divided by its own norm.
- ``loss``: for logits y and the label c of a sample, the one row softmax(y) - e_c: the gradient of
  the cross-entropy. What is measured is then the empirical Fisher matrix of the loss.
- ``kl``: for logits y and p = softmax(y), rows R_k = sqrt(p_k) (e_k - p), so that
  R^T R = diag(p) - p p^T, the Fisher matrix of the softmax: second order of the KL divergence.
  Logits of a sigmoid have theirs element by element; see ``links``.

Up to EXACT_LIMIT output elements per sample, one probe per element is exact. Above, Rademacher
probes v with E[v v^T] = I give E[(v^T R J_i)^2] = s_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_ecp.errors import CalibrationError, UsageError, did_you_mean
from onnx_ecp.gradients.links import LINKS, Link, softmax

EXACT_LIMIT = 16
METRICS = ("l2", "l2-raw", "kl", "loss")
# Those that square differences of the outputs themselves.
SQUARED = ("l2", "l2-raw")


@dataclass(frozen=True)
class SeedPlan:
    """How seeds are drawn; the same for every batch of a run.

    Args:
        metric: a name in METRICS.
        scales: by output name, the factors of its elements, where the metric is in SQUARED; they
            broadcast with the output.
        probes: number of Rademacher probes; 0 stands for exact one-hot seeds.
        seed: of the Rademacher signs.
        links: by output name, what makes probabilities of it, where that is not a softmax.
    """

    metric: str = "l2"
    scales: Mapping[str, np.ndarray] = field(default_factory=dict)
    probes: int = 0
    seed: int = 0
    links: Mapping[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(
                f"unknown metric {self.metric!r}.", hint=did_you_mean(self.metric, METRICS)
            )

    def seeds(
        self,
        outputs: Mapping[str, np.ndarray],
        numbers: Sequence[int] | np.ndarray,
        labels: np.ndarray | None = None,
        *,
        common: bool = False,
    ) -> dict[str, np.ndarray]:
        """Seeds (P, *shape of y) for one batch, in the dtype of each output.

        Args:
            outputs: y by name; under ``kl`` and ``loss`` they must be the logits.
            numbers: (samples,), those of the batch's samples in the whole data: the signs of a
                sample depend neither on the batch that it comes in nor on the shard.
            labels: class indices (samples,), which ``loss`` needs.
            common: whether all samples get the signs of sample 0: squares are averaged better with
                signs of their own, but gradients that are to be summed would cancel.

        Raises:
            CalibrationError: a label is no class.
        """
        if self.metric == "loss":
            assert labels is not None, "the observer has looked"
            return {
                name: (softmax(y) - one_hot(labels, y))[None].astype(y.dtype)
                for name, y in outputs.items()
            }
        raw = self._rademacher(outputs, numbers, common) if self.probes else _one_hot(outputs)
        return {
            name: self._in_metric(v.astype(outputs[name].dtype), outputs[name], name)
            for name, v in raw.items()
        }

    def _in_metric(self, v: np.ndarray, y: np.ndarray, name: str) -> np.ndarray:
        if self.metric in SQUARED:
            scale = self.scales.get(name)
            return v if scale is None else v * scale.astype(y.dtype)
        link = self.links.get(name, LINKS["Softmax"])
        return link.root(v, link.probabilities(y).astype(y.dtype))

    def _rademacher(
        self, outputs: Mapping[str, np.ndarray], numbers: Sequence[int] | np.ndarray, common: bool
    ) -> dict[str, np.ndarray]:
        samples = len(numbers)
        sizes = {name: y.size // samples for name, y in outputs.items()}
        size = self.probes * sum(sizes.values())
        if common:
            signs = np.repeat(_signs(self.seed, 0, 1, size), samples, axis=0)
        else:
            signs = np.concatenate([_signs(self.seed, *run, size) for run in _runs(numbers)])
        signs = signs.reshape(samples, self.probes, -1).swapaxes(0, 1) / np.sqrt(self.probes)
        ends = np.cumsum(list(sizes.values()))[:-1]
        parts = np.split(signs, ends, axis=2)
        return {
            name: part.reshape(self.probes, *outputs[name].shape)
            for name, part in zip(sizes, parts, strict=True)
        }


def plan(
    outputs: Mapping[str, np.ndarray],
    samples: int,
    *,
    metric: str,
    probes: int | None,
    seed: int,
) -> SeedPlan:
    """Exact seeds where the outputs of one sample are few, else Rademacher probes.

    Args:
        outputs: y of a first batch.
        samples: number of samples in it.
        metric: a name in METRICS.
        probes: number of Rademacher probes; None chooses exact seeds or one probe.
        seed: of the signs.
    """
    batched = all(y.ndim and y.shape[0] == samples for y in outputs.values())
    size = sum(y.size for y in outputs.values()) // samples
    if metric == "loss":
        probes = 1
    if probes is None:
        probes = 0 if batched and size <= EXACT_LIMIT else 1
    return SeedPlan(metric, {}, probes, seed)


def one_hot(labels: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probabilities of the shape of the logits (samples, classes) that are 1 for the label.

    Raises:
        CalibrationError: a label is no class.
    """
    if labels.max() >= y.shape[-1]:
        raise CalibrationError(
            f"label {labels.max()} is none of the {y.shape[-1]} classes of the output.",
            hint="Number classes from 0, as the columns of the output.",
        )
    return np.asarray(np.eye(y.shape[-1])[labels])


def _one_hot(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One probe per output element of a sample, over all outputs together; axis 1 is the sample."""
    sizes = {name: y[0].size for name, y in outputs.items()}
    total, first, seeds = sum(sizes.values()), 0, {}
    for name, y in outputs.items():
        eye = np.zeros((total, 1, sizes[name]), y.dtype)
        eye[first : first + sizes[name], 0] = np.eye(sizes[name])
        seeds[name] = np.broadcast_to(eye, (total, y.shape[0], sizes[name])).reshape(
            total, *y.shape
        )
        first += sizes[name]
    return seeds


def _runs(numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[int, int]]:
    """The first of, and how many, numbers that follow each other.

    >>> list(_runs([3, 4, 5, 9, 0, 1]))
    [(3, 3), (9, 1), (0, 2)]
    """
    ends = np.flatnonzero(np.diff(numbers) != 1) + 1
    for run in np.split(np.asarray(numbers), ends):
        yield int(run[0]), len(run)


def _signs(seed: int, start: int, samples: int, size: int) -> np.ndarray:
    """Random signs (samples, size) in int8 that depend on the sample's index only."""
    blocks = -(-size // 256)  # a Philox counter step yields 4 words of 64 bits
    bits = np.random.Philox(key=seed)
    bits.advance(start * blocks)
    words = bits.random_raw(samples * blocks * 4).reshape(samples, blocks * 4)
    flat = np.unpackbits(words.view(np.uint8), axis=1)[:, :size]
    return flat.astype(np.int8) * 2 - 1
