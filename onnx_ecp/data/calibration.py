"""Calibration data: any source becomes named arrays of samples that fit the model's inputs.

A sample is one row of the batch axis where every input of the model has a free first axis, and one
whole set of inputs otherwise (a fixed batch, a scalar, a batch axis that is not the first). Samples
may differ in shape along free axes; those of one shape are then put together into batches.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_ecp.data import images, ragged, sounds, tables, texts
from onnx_ecp.data import synthetic as synthesis
from onnx_ecp.data.feeds import LABEL_NAMES, files_in
from onnx_ecp.data.ragged import Ragged, Samples, shape_of
from onnx_ecp.data.synthetic import draw, is_fixed
from onnx_ecp.data.untrusted import (
    memory_budget,
    npz_headers,
    npz_names,
    read_npy,
    read_npz,
    read_polygraphy,
    read_tensor,
)
from onnx_ecp.errors import CalibrationError, OnnxEcpError, UsageError, did_you_mean
from onnx_ecp.graph import InputSpec
from onnx_ecp.runtime.digest import digest
from onnx_ecp.runtime.limits import check_deadline

# Elements that are looked at together when NaN and Inf are searched: 16 MiB of flags.
_CHUNK = 2**24
_SCRIPT = re.compile(r"(?P<path>.+\.py)(:(?P<function>\w+))?")

Inputs = Sequence[InputSpec]
Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Batch:
    """What one run of the model takes.

    Args:
        start: index of the first sample in it.
        feeds: array by input name, as the model wants them.
        samples: how many samples they hold.
        labels: of its rows (rows, ...), where there are any.
        numbers: of its samples in the whole data, see ``Calibration.numbers``; None where they
            count from ``start``.
    """

    start: int
    feeds: dict[str, np.ndarray]
    samples: int = 1
    labels: np.ndarray | None = None
    numbers: np.ndarray | None = None

    def halves(self) -> tuple[Batch, Batch]:
        """Two batches of half the size; only a batch of several samples has them."""
        middle = self.samples // 2
        return self._part(slice(middle)), self._part(slice(middle, self.samples))

    def _part(self, which: slice) -> Batch:
        start, stop, _ = which.indices(self.samples)
        return Batch(
            self.start + start,
            {name: array[which] for name, array in self.feeds.items()},
            stop - start,
            None if self.labels is None else self.labels[which],
            None if self.numbers is None else self.numbers[which],
        )

    @property
    def in_whole(self) -> np.ndarray:
        """(samples,): the numbers of its samples in the whole data; random probes follow them."""
        if self.numbers is None:
            return np.arange(self.start, self.start + self.samples)
        return self.numbers


@dataclass(frozen=True, eq=False)
class Calibration:
    """Samples for every input of a model.

    Args:
        arrays: by input name. Stacked: (samples, ...) of the model's own rank, axis 0 is the
            model's batch axis. Not stacked: (samples, *shape of the model's input). Where samples
            differ in shape, a ``Ragged`` of them.
        stacked: whether samples can be put together into batches.
        source: where they come from, for the report.
        synthetic: made up; importances measured with them reflect no real data.
        seed: that the choice of samples, or the samples themselves, were drawn with.
        labels: one per row, by sample (samples, rows of a sample, ...), as ``load_labels`` gives
            them; None where there are none.
        freed: stacked for a copy of the model with a free batch axis: the model itself takes one
            sample at a time.
        numbers: (samples,), of a shard, the places of its samples in the whole that it is a part
            of; None where this is the whole.
    """

    arrays: Mapping[str, Samples]
    stacked: bool
    source: str
    synthetic: bool
    seed: int
    labels: np.ndarray | None = None
    freed: bool = False
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, ``size`` at a time; one at a time where they are not stacked.

        Where they differ in shape, a batch ends before a sample of another one.
        """
        if not self.stacked:
            for i in range(len(self)):
                feeds = {name: ragged.one(array, i) for name, array in self.arrays.items()}
                which = slice(i, i + 1)
                yield Batch(i, feeds, 1, self._row_labels(which), self._numbers(which))
            return
        start = 0
        for end in self._ends():
            while start < end:
                stop = min(start + size, end)
                feeds = {n: ragged.run(array, start, stop) for n, array in self.arrays.items()}
                which = slice(start, stop)
                labels, numbers = self._row_labels(which), self._numbers(which)
                yield Batch(start, feeds, stop - start, labels, numbers)
                start = stop

    @property
    def uneven(self) -> bool:
        """Whether samples differ in shape."""
        return any(isinstance(array, Ragged) for array in self.arrays.values())

    def shapes(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Of all inputs of one sample."""
        return tuple(shape_of(array, index) for array in self.arrays.values())

    def grouped(self) -> Calibration:
        """The same samples, those of one shape next to each other.

        The first are the largest of which there are several: what is tried with one batch holds for
        the others.
        """
        if not self.uneven:
            return self
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i in range(len(self)):
            groups.setdefault(self.shapes(i), []).append(i)

        def order(shapes: tuple[tuple[int, ...], ...]) -> tuple[bool, int]:
            return len(groups[shapes]) == 1, -sum(map(math.prod, shapes))

        return self.take(np.concatenate([groups[shapes] for shapes in sorted(groups, key=order)]))

    def another(self) -> Batch | None:
        """A sample whose shape is least like that of the first; None if all are alike."""
        if not self.uneven:
            return None
        first = self.shapes(0)

        def apart(i: int) -> int:
            pairs = zip(first, self.shapes(i), strict=True)
            return sum(a != b for x, y in pairs for a, b in zip(x, y, strict=True))

        return next(self.take([max(range(len(self)), key=apart)]).batches(1))

    def _ends(self) -> Iterator[int]:
        """Behind the last sample of every run of samples of one shape."""
        if self.uneven:
            yield from (i for i in range(1, len(self)) if self.shapes(i) != self.shapes(i - 1))
        yield len(self)

    def take(self, indices: Sequence[int] | np.ndarray) -> Calibration:
        """The samples with these indices, in this order."""
        arrays = {n: ragged.taken(array, np.asarray(indices)) for n, array in self.arrays.items()}
        labels = None if self.labels is None else self.labels[indices]
        numbers = None if self.numbers is None else self.numbers[indices]
        return replace(self, arrays=arrays, labels=labels, numbers=numbers)

    def shard(self, indices: Sequence[int] | np.ndarray) -> Calibration:
        """As ``take``, but the samples keep their numbers in the whole.

        So sums over the shards of a set, however it was parted, are those over the set: what is
        random follows the number of a sample.
        """
        known = self.numbers is not None
        whole = self if known else replace(self, numbers=np.arange(len(self)))
        return whole.take(indices)

    @property
    def of_one(self) -> frozenset[str]:
        """Names of the inputs with a batch axis that is fixed to one, none where it is free."""
        if self.stacked:
            return frozenset()
        return frozenset(name for name, array in self.arrays.items() if shape_of(array)[:1] == (1,))

    def together(self) -> Calibration:
        """For a copy of the model with a free batch axis; every input must be ``of_one``."""
        arrays = {name: ragged.without_axis(array) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, stacked=True, freed=True)

    @property
    def alone(self) -> Calibration:
        """One a run, each a batch of one: for a model that takes no more than that at once."""
        arrays = {name: ragged.with_axis(array) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, stacked=False)

    @property
    def as_given(self) -> Calibration:
        """For the model itself, whatever copy of it the samples were put together for."""
        if not self.freed:
            return self
        arrays = {name: ragged.with_axis(array) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, stacked=False, freed=False)

    @cached_property
    def identity(self) -> str:
        """A digest of the samples, their labels and numbers, wherever they come from."""
        return digest(self.arrays, self.stacked, self.labels, self.freed, self.numbers)

    @property
    def row_labels(self) -> np.ndarray | None:
        """The labels (rows, ...) of all samples, where there are any."""
        return self._row_labels(slice(None))

    def _numbers(self, which: slice) -> np.ndarray | None:
        return None if self.numbers is None else self.numbers[which]

    def _row_labels(self, which: slice) -> np.ndarray | None:
        if self.labels is None:
            return None
        return self.labels[which].reshape(-1, *self.labels.shape[2:])

    def split(self, fraction: float, seed: int) -> tuple[Calibration, Calibration]:
        """Part at random into calibration and held-out samples; each keeps its order.

        Args:
            fraction: share of the samples that is held out, in (0, 1); both parts get at least
                one. A single sample is both parts: the two are then the same object.
            seed: of the permutation.
        """
        if len(self) == 1:
            return self, self
        held_out = min(max(round(len(self) * fraction), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[held_out:])), self.take(np.sort(order[:held_out]))

    def limit(self, n: int, seed: int) -> Calibration:
        """At most ``n`` samples: those of ``subset``."""
        return self if n >= len(self) else self.take(subset(len(self), n, seed))


def subset(total: int, n: int, seed: int) -> np.ndarray:
    """Indices (n,) of the samples that ``limit`` keeps, ascending: for labels that go with them."""
    if n >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, n, replace=False))


def load(source: Any, inputs: Inputs, *, samples: int | None = None, seed: int = 0) -> Calibration:
    """Read calibration data and prove that it fits the model.

    Args:
        source: a path (.npz, .npy, a folder of them, test_data_set folders, Polygraphy .json,
            ``SCRIPT.py[:function]``), a dict of arrays, an array, an iterable of feeds, an object
            with ``get_next()``, or a Calibration.
        inputs: the model's inputs.
        samples: at most so many: the first ones of an iterable, which may be endless, else
            ``subset``. All when None.
        seed: of the subset.

    Raises:
        CalibrationError: when anything does not fit; nothing is cast except integers to wider
            ones, and no sample is dropped.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"at least one sample is needed, not {samples}.")
    if isinstance(source, Calibration):
        return source if samples is None else source.limit(samples, seed)
    kind = next((kind for kind in SOURCES.values() if kind.accepts(source)), None)
    if kind is None:
        raise _unknown(source)
    parts = kind.read(source, inputs)
    if kind.stream:
        parts = _until(parts, samples, _origin(source))
    whole = replace(_joined(list(parts), inputs, _origin(source)), seed=seed)
    if kind.told is not None:
        whole = replace(whole, source=f"{whole.source} ({kind.told(source, inputs)})")
    indices = np.arange(len(whole))
    if samples is not None and samples < len(whole):
        indices = indices[:samples] if kind.stream else subset(len(whole), samples, seed)
        whole = whole.take(indices)
    _check_finite(whole, indices)
    return whole


def synthetic(
    proto: onnx.ModelProto,
    inputs: Inputs,
    *,
    samples: int = 128,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Calibration:
    """Made-up samples from the model's own signature; see ``onnx_ecp.data.synthetic``.

    Args:
        proto: the model, which tells what integers are legal.
        inputs: its inputs.
        samples: how many.
        seed: of the draw.
        shapes: whole shapes for inputs with free axes (``--input-shapes``).

    Raises:
        UsageError: when ``shapes`` names no input or contradicts the model.
    """
    arrays = draw(proto, inputs, samples=samples, seed=seed, shapes=shapes or {})
    origin = f"{samples} synthetic samples"
    return replace(fit(arrays, inputs, origin), synthetic=True, seed=seed)


def check_shapes(given: Calibration, inputs: Inputs, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Real samples have shapes of their own: those chosen with ``--input-shapes`` must be these.

    Raises:
        UsageError: a shape is of no input, contradicts the model, or is not that of the samples.
    """
    synthesis.check_shapes(inputs, shapes)
    for name, shape in shapes.items():
        wanted = shape[1:] if given.stacked else shape
        found = given.arrays[name]
        own = shape_of(found)
        if isinstance(found, Ragged):
            raise UsageError(
                f"--input-shapes says {','.join(map(str, shape))} for input {name!r}, but the "
                f"samples of {given.source} differ in shape.",
                hint="Leave it out: real samples tell their own shapes.",
            )
        if own != wanted:
            sizes = ",".join(map(str, ("N", *own) if given.stacked else own))
            raise UsageError(
                f"--input-shapes says {','.join(map(str, shape))} for input {name!r}, but the "
                f"samples of {given.source} are {sizes}.",
                hint="Leave it out: real samples tell their own shapes.",
            )


def sidecar(model_path: str | Path) -> Path | None:
    """The calibration file beside a model, ``in.npz`` for ``in.onnx``, if there is one."""
    path = Path(model_path).with_suffix(".npz")
    return path if path.is_file() else None


def file_of(source: str | Path) -> Path:
    """The file or folder that a source given as a path is read from."""
    script = _SCRIPT.fullmatch(str(source))
    return Path(script["path"] if script else source)


def is_stream(source: Any) -> bool:
    """Whether a source gives one sample after another, perhaps without an end."""
    kind = next((kind for kind in SOURCES.values() if kind.accepts(source)), None)
    return kind is not None and kind.stream


def count_labels(source: str | Path | np.ndarray) -> int:
    """How many labels a file or an array has; see ``load_labels``."""
    labels = _labels_array(source)
    return len(labels) if labels.ndim else 1


def labels_name(source: str | Path | np.ndarray) -> str:
    """How labels are called in errors and reports."""
    return "the labels given" if isinstance(source, np.ndarray) else str(source)


def load_labels(source: str | Path | np.ndarray, n: int) -> np.ndarray:
    """Labels from an array, a .npy file, or ``y`` or ``labels`` of an .npz file.

    Args:
        source: path of the file, or the array.
        n: number of samples.

    Returns:
        Class indices, int64 (n,), or the targets of a regression, float64 (n, ...).

    Raises:
        CalibrationError: when they are missing, are neither, or are not ``n``.
    """
    path, labels = labels_name(source), _labels_array(source)
    regression = labels.dtype.kind == "f" and labels.ndim > 0
    if (labels.shape[:1] if regression else labels.shape) != (n,) or labels.dtype.kind not in "iuf":
        raise CalibrationError(
            f"{path}: labels are {labels.dtype} {_shape(labels.shape)}; integers ({n}) expected, "
            f"or floating-point targets ({n}, ...).",
            hint="One class index per sample; of one-hot labels take the argmax.",
        )
    if regression:
        _check_targets(path, labels)
        return np.array(labels, dtype=np.float64)
    if labels.min() < 0 or labels.max() > np.iinfo(np.int64).max:
        raise CalibrationError(
            f"{path}: label {labels.min()} is no class index.",
            hint="Number classes from 0, as the columns of the output.",
        )
    return np.array(labels, dtype=np.int64)


def _check_targets(path: str, targets: np.ndarray) -> None:
    bad = ~np.isfinite(targets).reshape(len(targets), -1).all(axis=1)
    if bad.any():
        raise CalibrationError(
            f"{path}: the target of sample {int(bad.argmax())} is not finite.",
            hint="Remove or repair the sample.",
        )


def _labels_array(source: str | Path | np.ndarray) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    path = Path(source)
    if not path.is_file():
        what = "not a regular file" if os.path.lexists(path) else "no such file"
        raise CalibrationError(f"{path}: {what}.", hint="Give the path of a file.")
    if path.suffix == ".npy":
        return read_npy(path)
    if path.suffix != ".npz":
        raise CalibrationError(
            f"{path}: labels are a .npy file, or an .npz file with {' or '.join(LABEL_NAMES)}.",
            hint="Write it with numpy.save or numpy.savez.",
        )
    names = npz_names(path)
    name = next((name for name in LABEL_NAMES if name in names), None)
    if name is None:
        raise CalibrationError(
            f"{path}: has no labels: its arrays are {', '.join(names)}.",
            hint=f"Name the labels {' or '.join(LABEL_NAMES)}.",
        )
    return read_npz(path, [name])[name]


# From given arrays to arrays that fit.


def fit(arrays: Mapping[Any, Any], inputs: Inputs, origin: str) -> Calibration:
    """Arrays of many samples as a Calibration; every way in ends here.

    An input of which there is one sample, where others have more, is the same in all of them.
    """
    given = _named(arrays, inputs, origin)
    placed = {spec.name: _place(given[spec.name], spec, origin) for spec in inputs}
    stacked = all(on_batch_axis for _, on_batch_axis in placed.values())
    # A stacked input next to one that is not: every sample is a batch of one.
    fitted = {
        name: array if on_batch_axis == stacked else array[:, None]
        for name, (array, on_batch_axis) in placed.items()
    }
    samples = max(map(len, fitted.values()))
    fitted = {
        name: array if len(array) > 1 else np.broadcast_to(array, (samples, *array.shape[1:]))
        for name, array in fitted.items()
    }
    counts = {name: len(array) for name, array in fitted.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise CalibrationError(
            f"{origin}: the inputs have different numbers of samples: {listed}.",
            hint="Give what all samples share (a state, a scalar) once, in the shape of the input: "
            + ", ".join(f"{spec.name} {_wanted(spec)}" for spec in inputs)
            + ".",
        )
    return Calibration(fitted, stacked, origin, synthetic=False, seed=0)


def _fit_lists(
    arrays: Mapping[Any, Any], inputs: Inputs, origin: str, listed: Collection[str] = ()
) -> Iterator[Calibration]:
    """Inputs as lists with an array for every sample, beside arrays of all samples or of one.

    Args:
        arrays: by input name.
        inputs: of the model.
        origin: for errors.
        listed: names that are lists, beside those that no one array can hold.
    """
    lists = {name: list(x) for name, x in arrays.items() if name in listed or _is_list(x)}
    counts = {str(name): len(x) for name, x in lists.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise CalibrationError(
            f"{origin}: the inputs have different numbers of samples: {listed}.",
            hint="Give lists with one array for every sample.",
        )
    (samples,) = set(counts.values())
    if samples == 0:
        raise CalibrationError(f"{origin}: no samples.", hint="At least one is needed.")
    shapes = {spec.name: spec.shape for spec in inputs}

    def of_one(name: Any, i: int) -> Any:
        if name in lists:
            return lists[name][i]
        array = arrays[name]
        if not isinstance(array, np.ndarray | np.generic):
            return array
        array = np.asarray(array)
        every = array.ndim > 0 and len(array) == samples and not _is_shared(array, shapes.get(name))
        return array[i] if every else array

    for i in range(samples):
        feed = {name: of_one(name, i) for name in arrays}
        yield _fit_feed(feed, inputs, f"{origin}: sample {i}")


def _is_list(value: Any) -> bool:
    """Whether a value is a list of arrays that no one array can hold."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return len({np.shape(x) if hasattr(x, "__array__") else None for x in value}) > 1


def _is_shared(array: np.ndarray, shape: Shape | None) -> bool:
    """Whether an array is what one run takes, of an input without a free first axis."""
    return not _is_free_first(shape) and _fits(array.shape, shape)


def _fit_feed(feed: Any, inputs: Inputs, origin: str) -> Calibration:
    """What one run of the model takes, a batch or a single sample, as a Calibration."""
    if not isinstance(feed, Mapping):
        feed = {_only_input(inputs, origin, feed): feed}
    given = _named(feed, inputs, origin)
    free = all(_is_free_first(spec.shape) for spec in inputs)
    fits = all(_fits(given[spec.name].shape, spec.shape) for spec in inputs)
    whole = fits and (not free or _counts_apart(given, inputs))
    for spec in inputs:
        array = given[spec.name]
        lacks_batch_axis = spec.shape is not None and array.ndim == max(len(spec.shape), 1) - 1
        if whole or lacks_batch_axis:
            given[spec.name] = array[None]
    return fit(given, inputs, origin)


def _counts_apart(given: Mapping[str, np.ndarray], inputs: Inputs) -> bool:
    """Whether first axes count different things, such as the nodes and edges of one graph."""
    sizes = {given[spec.name].shape[:1] for spec in inputs}
    return len(sizes) > 1 and _names_apart(inputs)


def _names_apart(inputs: Inputs) -> bool:
    """Whether the first axes of all inputs are free, and not all of one name."""
    names = [spec.shape[0] if spec.shape else None for spec in inputs]
    return all(isinstance(name, str) and name for name in names) and len(set(names)) > 1


def _check_known(arrays: Iterable[Any], inputs: Inputs, origin: str) -> None:
    """CalibrationError for a name that is no input; labels are passed over.

    As for an array with masked values: what lies below the mask is no value.
    """
    if isinstance(arrays, Mapping):
        _check_unmasked(arrays, origin)
    names = [spec.name for spec in inputs]
    for name in arrays:
        if name not in names and name not in LABEL_NAMES:
            raise CalibrationError(
                f"{origin}: {name!r} is not an input of the model.",
                hint=did_you_mean(str(name), names),
            )


def _check_unmasked(arrays: Mapping[Any, Any], origin: str) -> None:
    for name, value in arrays.items():
        if any(map(np.ma.is_masked, value if isinstance(value, list | tuple) else (value,))):
            raise CalibrationError(
                f"{origin}: {name!r} is a masked array, and some of its values are masked.",
                hint="Fill them, as with its method `filled`, or leave such samples out.",
            )


def _named(arrays: Mapping[Any, Any], inputs: Inputs, origin: str) -> dict[str, np.ndarray]:
    """Exactly one array for every input, of its dtype."""
    _check_known(arrays, inputs, origin)
    missing = next((spec for spec in inputs if spec.name not in arrays), None)
    if missing is not None:
        raise CalibrationError(
            f"{origin}: no array for input {missing.name!r}: {_wanted(missing)}.",
            hint=f"The arrays given are {', '.join(sorted(map(str, arrays))) or 'none'}.",
        )
    if not inputs:
        raise CalibrationError(
            f"{origin}: the model has no inputs to calibrate with.",
            hint="A model without inputs computes a constant: store that instead.",
        )
    return {spec.name: _typed(arrays[spec.name], spec, origin) for spec in inputs}


def _typed(value: Any, spec: InputSpec, origin: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"{origin}: input {spec.name!r} is no array: {error}.",
            hint="Give what numpy.asarray takes.",
        ) from error
    have, want = array.dtype, spec.dtype
    if want is not None and want.kind != "O":
        if have.newbyteorder("=") == want:
            return array.astype(want, copy=False)
        if have.kind in "iu" and want.kind in "iu" and np.can_cast(have, want):
            return array.astype(want)
    raise CalibrationError(
        f"{origin}: input {spec.name!r} is {have} {_shape(array.shape)}; {_wanted(spec)} expected.",
        hint=_conversion(have, want),
    )


def _conversion(have: np.dtype, want: np.dtype | None) -> str:
    if want is None or want.kind == "O":
        return "Only inputs that are tensors of numbers can be calibrated."
    if have.kind not in "biuf":
        return "Give plain numeric arrays."
    if have.kind in "iu" and want.kind not in "iu":
        return (
            "Scale as in training, for example (array / 255).astype(np.float32), "
            f"or convert the plain values: array.astype(np.{want})."
        )
    return f"Convert it: array.astype(np.{want})."


def _place(array: np.ndarray, spec: InputSpec, origin: str) -> tuple[np.ndarray, bool]:
    """The array with samples on axis 0, and whether that is the model's batch axis."""
    given, shape = array.shape, spec.shape
    if array.size == 0:
        raise CalibrationError(
            f"{origin}: input {spec.name!r} is empty: shape {_shape(given)}.",
            hint="At least one sample is needed.",
        )
    stacked = shape is None or (len(given) == len(shape) and _is_free_first(shape))
    if shape and not stacked and len(given) == len(shape):
        array = _whole_batches(array, spec, origin)
    if array.ndim == 0 and shape == ():
        return array[None], False
    if array.ndim == 0 or not _fits(array.shape if stacked else array.shape[1:], shape):
        raise CalibrationError(
            f"{origin}: input {spec.name!r} has shape {_shape(given)}; {_wanted(spec)} expected.",
            hint="The first axis is the samples; the others must be those of the model's input. "
            "Samples that differ in shape: a list of arrays, one per sample. What all share: once, "
            f"as {_wanted(spec)}.",
        )
    return array, stacked


def _whole_batches(array: np.ndarray, spec: InputSpec, origin: str) -> np.ndarray:
    """(m * B, ...) as (m, B, ...) for a model whose first dimension is fixed to B."""
    assert spec.shape is not None
    size = spec.shape[0]
    assert isinstance(size, int), "a free first axis is stacked"
    if len(array) % size:
        whole = len(array) // size * size
        raise CalibrationError(
            f"{origin}: input {spec.name!r} has {len(array)} rows, which is no multiple of "
            f"the model's fixed batch of {size}.",
            hint=f"Give {f'{whole} or ' if whole else ''}{whole + size} rows.",
        )
    return array.reshape(-1, size, *array.shape[1:])


def _is_free_first(shape: Shape | None) -> bool:
    return shape is None or (len(shape) > 0 and not is_fixed(shape[0]))


def _fits(own: tuple[int, ...], shape: Shape | None) -> bool:
    if shape is None:
        return True
    return len(own) == len(shape) and all(
        have == want for have, want in zip(own, shape, strict=True) if is_fixed(want)
    )


def _shape(shape: Iterable[int | str | None]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _wanted(spec: InputSpec) -> str:
    numbers = spec.dtype is not None and spec.dtype.kind != "O"
    dtype = str(spec.dtype) if numbers else "no tensor of numbers"
    return dtype if spec.shape is None else f"{dtype} {_shape(spec.shape)}"


def _joined(parts: list[Calibration], inputs: Inputs, origin: str) -> Calibration:
    """One Calibration out of many; batches are opened up unless all parts are stacked."""
    if not parts:
        raise CalibrationError(f"{origin}: no samples.", hint="At least one is needed.")
    stacked = all(part.stacked for part in parts)
    if not stacked and _names_apart(inputs):
        # Where one sample has as many nodes as edges, that says nothing.
        parts = [_as_whole(part) if part.stacked else part for part in parts]
    arrays = {}
    for name in parts[0].arrays:
        pieces = [
            x if part.stacked == stacked else ragged.with_axis(x)
            for part in parts
            for x in (part.arrays[name],)
        ]
        shapes = sorted({shape_of(piece) for piece in pieces}, key=len)
        if len(shapes[0]) != len(shapes[-1]):
            raise CalibrationError(
                f"{origin}: samples of input {name!r} have different numbers of axes: "
                f"{_shape(shapes[0])} and {_shape(shapes[-1])}.",
                hint="Shapes may differ, numbers of axes may not.",
            )
        free = all(_is_free_first(spec.shape) for spec in inputs)
        rows = free and not stacked and not _names_apart(inputs)
        if rows and len({shape[:1] for shape in shapes}) > 1:
            raise CalibrationError(
                f"{origin}: sets of samples of input {name!r} differ in shape: "
                f"{_shape(shapes[0])} and {_shape(shapes[-1])}.",
                hint="Give the rows of the batch axis as samples, without another axis in front.",
            )
        arrays[name] = Ragged.joined(pieces)
    return replace(parts[0], arrays=arrays, stacked=stacked, source=origin)


def _as_whole(part: Calibration) -> Calibration:
    """A stacked batch as what one run takes."""
    arrays: dict[str, Samples] = {}
    for name, array in part.arrays.items():
        assert isinstance(array, np.ndarray), "one feed has one shape"
        arrays[name] = array[None]
    return replace(part, arrays=arrays, stacked=False)


def _until(parts: Iterable[Calibration], samples: int | None, origin: str) -> Iterator[Calibration]:
    """The first parts of a stream, which may have no end."""
    count, taken, budget = 0, 0, memory_budget()
    for part in parts:
        check_deadline()
        if taken > budget:
            raise CalibrationError(
                f"{origin}: {count} samples take more than half of the free memory, and there "
                "are more.",
                hint="Say with --samples how many to use.",
            )
        yield part
        count += len(part)
        taken += sum(array.nbytes for array in part.arrays.values())
        if samples is not None and count >= samples:
            return


def _check_finite(calibration: Calibration, indices: np.ndarray) -> None:
    """Refuse NaN and Inf; ``indices`` are the samples' numbers in their source."""
    for name, array in calibration.arrays.items():
        if array.dtype.kind in "biu":
            continue
        even = isinstance(array, np.ndarray)
        step = max(1, _CHUNK // max(1, math.prod(shape_of(array)))) if even else 1
        for start in range(0, len(array), step):
            rows = ragged.run(array, start, min(start + step, len(array)))
            bad = ~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
            if bad.any():
                raise CalibrationError(
                    f"{calibration.source}: input {name!r} has NaN or Inf in sample "
                    f"{indices[start + int(bad.argmax())]}.",
                    hint="Remove or repair such samples: one is enough to spoil every average.",
                )


# The sources.


def _from_npz(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    path = Path(source)
    found = set(npz_names(path))
    lists = {
        spec.name: names
        for spec in inputs
        if spec.name not in found and (names := _numbered_arrays(found, spec.name))
    }
    parts = {name for names in lists.values() for name in names}
    # Only what the model takes is unpacked, and not before it fits by what its headers declare.
    wanted = [*(spec.name for spec in inputs if spec.name in found), *parts]
    for arrays in (_stand_ins(path, wanted, inputs), None):
        fitted = _npz_fitted(path, arrays or read_npz(path, wanted), lists, found - parts, inputs)
        if arrays is None:
            yield from fitted
        else:
            for _ in fitted:
                pass


def _stand_ins(path: Path, names: Sequence[str], inputs: Inputs) -> dict[str, np.ndarray]:
    """Arrays of one number that look like those of an .npz file, as its headers declare them."""
    wanted = {spec.name: spec.dtype for spec in inputs}
    found = {}
    for name, (shape, dtype) in npz_headers(path, names).items():
        to = wanted.get(name.rpartition("/")[0] if name not in wanted else name)
        if to is not None and dtype.kind in "iu" and np.can_cast(dtype, to, "safe"):
            dtype = to  # what would be widened would take memory
        found[name] = np.broadcast_to(np.zeros((), dtype), shape)
    return found


def _npz_fitted(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    lists: Mapping[str, Sequence[str]],
    names: Collection[str],
    inputs: Inputs,
) -> Iterator[Calibration]:
    """The arrays of an .npz file as samples.

    Args:
        path: of the file.
        arrays: by name in the file, those that the model takes.
        lists: by input, the names of the arrays of its samples.
        names: of all other arrays in the file.
        inputs: of the model.
    """
    arrays = dict(arrays)
    listed = {name: [arrays.pop(part) for part in names] for name, names in lists.items()}
    whole = dict.fromkeys(sorted(names)) | arrays  # None: names that are objected to
    if listed:
        _check_known(whole, inputs, str(path))
        whole = {name: x for name, x in whole.items() if x is not None}
        yield from _fit_lists(whole | listed, inputs, str(path), listed.keys())
    else:
        yield fit(whole, inputs, str(path))


def _numbered_arrays(found: Collection[str], name: str) -> list[str]:
    """``name/0``, ``name/1`` and so on, as far as they are there."""
    return [
        f"{name}/{i}"
        for i in itertools.takewhile(lambda i: f"{name}/{i}" in found, itertools.count())
    ]


def _from_npy(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    path = Path(source)
    array = read_npy(path)
    yield fit({_only_input(inputs, str(path), array): array}, inputs, str(path))


def _from_folder(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    """A .npy file for each of several inputs; else all files, sorted, one after another."""
    folder = Path(source)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".npy", ".npz"))
    if not files:
        raise CalibrationError(
            f"{folder}: has no .npz, .npy, input_*.pb or test_data_set_* in it.",
            hint="Give the folder that holds the calibration files themselves.",
        )
    if len(inputs) > 1 and all(path.suffix == ".npy" for path in files):
        arrays = {path.stem: read_npy(path) for path in files}
        yield fit(arrays, inputs, str(folder))
        return
    for path in files:
        if path.suffix == ".npy":
            array = read_npy(path)
            name = _only_input(inputs, str(path), array)
            yield _fit_feed({name: array}, inputs, str(path))
        elif _numbered_inputs(path, inputs):
            yield from _from_npz(path, inputs)
        else:
            found = npz_names(path)
            wanted = [spec.name for spec in inputs if spec.name in found]
            given: dict[str, Any] = dict.fromkeys(found)
            _fit_feed(given | _stand_ins(path, wanted, inputs), inputs, str(path))
            yield _fit_feed(given | read_npz(path, wanted), inputs, str(path))


def _numbered_inputs(path: Path, inputs: Inputs) -> bool:
    """Whether an .npz file holds an array for every sample."""
    found = set(npz_names(path))
    return any(x.name not in found and _numbered_arrays(found, x.name) for x in inputs)


def _from_test_data(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    """ONNX's own test data: input_N.pb belongs to the N-th input, or to that of its name."""
    folder = Path(source)
    for data_set in _numbered(folder, "test_data_set_*") or [folder]:
        tensors = [read_tensor(path) for path in _numbered(data_set, "input_*.pb")]
        names = [spec.name for spec in inputs]
        if len(tensors) != len(names):
            raise CalibrationError(
                f"{data_set}: has {len(tensors)} input_*.pb; the model has {len(names)} inputs.",
                hint=f"One file for each of {', '.join(names)}.",
            )
        if {name for name, _ in tensors} != set(names):
            tensors = [(name, array) for name, (_, array) in zip(names, tensors, strict=True)]
        yield _fit_feed(dict(tensors), inputs, str(data_set))


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Matching paths in the order of the number that ends their stem."""
    return sorted(folder.glob(pattern), key=lambda p: (len(p.stem), p.stem))


def _from_polygraphy(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    for i, feed in enumerate(read_polygraphy(Path(source))):
        yield _fit_feed(feed, inputs, f"{source}: feed {i}")


def _from_script(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    """Runs the user's own program, which he named."""
    match = _SCRIPT.fullmatch(str(source))
    assert match is not None, "the table matched it"
    path, name = Path(match["path"]), match["function"] or "load_data"
    if not path.is_file():
        what = "not a regular file" if os.path.lexists(path) else "no such file"
        raise CalibrationError(f"{path}: {what}.", hint="Give the path of a file.")
    with _importing(path):
        with _own_code(source, name):
            module = _module(path)
            if not callable(getattr(module, name, None)):
                functions = [key for key, value in vars(module).items() if callable(value)]
                raise CalibrationError(
                    f"{path}: has no function {name!r}.", hint=did_you_mean(name, functions)
                )
            feeds = iter(getattr(module, name)())
        yield from _from_iterable(_stepped(feeds, source, name), inputs, origin=str(source))


def _stepped(feeds: Iterator[Any], source: Any, name: str) -> Iterator[Any]:
    """What a script's function yields; only the script itself runs inside the guard."""
    while True:
        with _own_code(source, name):
            try:
                feed = next(feeds)
            except StopIteration:
                return
        yield feed


@contextmanager
def _own_code(source: Any, name: str) -> Iterator[None]:
    """Whatever the user's program raises says so; signals and limits stay what they are."""
    try:
        yield
    except OnnxEcpError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _made_up(error):
            raise
        raise CalibrationError(
            f"{source}: failed with {type(error).__name__}: {error}.",
            hint=f"It must yield dicts of arrays: for feeds in {name}(): ...",
        ) from error


def _made_up(error: KeyboardInterrupt) -> bool:
    """Whether no signal stands behind it: those of handlers other than Python's have own types."""
    return type(error) is KeyboardInterrupt and (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    )


@contextmanager
def _importing(path: Path) -> Iterator[None]:
    """As ``python path`` would: the script's folder comes first on the module path."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("onnx_ecp_calibration_script", path)
    assert spec is not None, "a .py path always has a loader"
    assert spec.loader is not None, "a .py path always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _from_reader(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    """An onnxruntime.quantization.CalibrationDataReader, or whatever has its one method."""
    yield from _from_iterable(iter(source.get_next, None), inputs, origin=_origin(source))


def _from_iterable(source: Any, inputs: Inputs, origin: str = "") -> Iterator[Calibration]:
    """What is yielded is copied: a reader may fill one buffer again and again."""
    for i, feed in enumerate(source):
        part = _fit_feed(feed, inputs, f"{origin or _origin(source)}: feed {i}")
        yield replace(part, arrays={name: np.array(x) for name, x in part.arrays.items()})


def _from_dict(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    if any(map(_is_list, source.values())):
        yield from _fit_lists(source, inputs, _origin(source))
    elif _names_apart(inputs) and all(_is_whole(source.get(x.name), x) for x in inputs):
        yield _fit_feed(source, inputs, _origin(source))  # one graph, or a batch
    else:
        yield fit(source, inputs, _origin(source))


def _is_whole(value: Any, spec: InputSpec) -> bool:
    return hasattr(value, "__array__") and _fits(np.shape(value), spec.shape)


def _from_array(source: Any, inputs: Inputs) -> Iterator[Calibration]:
    yield fit({_only_input(inputs, _origin(source), source): source}, inputs, _origin(source))


def _only_input(inputs: Inputs, origin: str, value: Any) -> str:
    """Name of the model's single input, for an array that comes without a name."""
    if len(inputs) != 1 or not hasattr(value, "__array__"):
        names = ", ".join(spec.name for spec in inputs)
        raise CalibrationError(
            f"{origin}: {type(value).__name__} without the name of an input.",
            hint=f"Give a dict of arrays, by the names of the model's inputs: {names}.",
        )
    return inputs[0].name


def _is_file(suffix: str) -> Callable[[Any], bool]:
    """Regular files only: reading a pipe or a device may never end."""

    def accepts(source: Any) -> bool:
        return _is_path(source) and Path(source).suffix == suffix and os.path.isfile(source)

    return accepts


def _is_path(source: Any) -> bool:
    return isinstance(source, str | Path)


def _is_test_data(source: Any) -> bool:
    return _is_folder(source) and any(
        next(Path(source).glob(pattern), None) for pattern in ("input_*.pb", "test_data_set_*")
    )


def _is_folder(source: Any) -> bool:
    return _is_path(source) and os.path.isdir(source)


def _is_script(source: Any) -> bool:
    return _is_path(source) and _SCRIPT.fullmatch(str(source)) is not None


def _is_iterable(source: Any) -> bool:
    return isinstance(source, Iterable) and not isinstance(source, str | bytes)


@dataclass(frozen=True)
class Source:
    """A kind of calibration source.

    Args:
        accepts: whether a source is of this kind.
        read: its contents as Calibrations that fit the model's inputs, to be joined.
        stream: whether it may be endless, so that reading stops when there are enough samples.
        told: what is done to it on the way, for the report.
    """

    accepts: Callable[[Any], bool]
    read: Callable[[Any, Inputs], Iterator[Calibration]]
    stream: bool = False
    told: Callable[[Any, Inputs], str] | None = None


def _feeds(
    read: Callable[[Path, Inputs], Iterator[dict[str, np.ndarray]]],
) -> Callable[[Any, Inputs], Iterator[Calibration]]:
    """A row's ``read``, of a reader that yields what one sample takes."""

    def parts(source: Any, inputs: Inputs) -> Iterator[Calibration]:
        for i, feed in enumerate(read(Path(source), inputs)):
            yield _fit_feed(feed, inputs, f"{source}: sample {i}")

    return parts


def _arrays(
    read: Callable[[Path, Inputs], dict[str, np.ndarray]],
) -> Callable[[Any, Inputs], Iterator[Calibration]]:
    """A row's ``read``, of a reader that returns all samples."""

    def parts(source: Any, inputs: Inputs) -> Iterator[Calibration]:
        yield fit(read(Path(source), inputs), inputs, str(source))

    return parts


def _folder_of(suffixes: Collection[str]) -> Callable[[Any], bool]:
    """Folders with such files, and no arrays at their top."""

    def accepts(source: Any) -> bool:
        if not _is_folder(source):
            return False
        arrays = any(next(Path(source).glob(f"*{suffix}"), None) for suffix in (".npy", ".npz"))
        return not arrays and bool(files_in(Path(source), suffixes))

    return accepts


# The first row that accepts a source reads it.
SOURCES: dict[str, Source] = {
    "test_data_set folder": Source(_is_test_data, _from_test_data),
    "folder of images": Source(_folder_of(images.SUFFIXES), _feeds(images.read), told=images.told),
    "folder of .wav": Source(_folder_of(sounds.SUFFIXES), _feeds(sounds.read), told=sounds.told),
    "folder": Source(_is_folder, _from_folder),
    ".npz": Source(_is_file(".npz"), _from_npz),
    ".npy": Source(_is_file(".npy"), _from_npy),
    ".csv": Source(_is_file(".csv"), _arrays(tables.read_csv)),
    ".parquet": Source(_is_file(".parquet"), _arrays(tables.read_parquet)),
    ".txt beside tokenizer.json": Source(_is_file(".txt"), _feeds(texts.read)),
    "Polygraphy .json": Source(_is_file(".json"), _from_polygraphy),
    "SCRIPT.py[:function]": Source(_is_script, _from_script, stream=True),
    "CalibrationDataReader": Source(lambda s: hasattr(s, "get_next"), _from_reader, stream=True),
    "dict of arrays": Source(lambda s: isinstance(s, Mapping), _from_dict),
    "array": Source(lambda s: hasattr(s, "__array__"), _from_array),
    "iterable of dicts": Source(_is_iterable, _from_iterable, stream=True),
}


def _origin(source: Any) -> str:
    """How a source is called in errors and the report."""
    return str(source if _is_path(source) else type(source).__name__)


def _unknown(source: Any) -> CalibrationError:
    if _is_path(source) and not os.path.exists(source):
        return CalibrationError(
            f"{source}: no such file or folder.", hint="Check the path that is given."
        )
    if _is_path(source) and not (os.path.isfile(source) or os.path.isdir(source)):
        return CalibrationError(
            f"{source}: not a regular file.",
            hint="Write the samples into a file: pipes may not end.",
        )
    return CalibrationError(
        f"{_origin(source)}: not a kind of calibration data.",
        hint=f"Known: {', '.join(SOURCES)}.",
    )
