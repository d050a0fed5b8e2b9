"""A folder of .wav files: PCM in [-1, 1), in windows where the model wants a fixed length."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onnx_ecp.data.feeds import files_in
from onnx_ecp.data.untrusted import read_bytes
from onnx_ecp.errors import CalibrationError
from onnx_ecp.graph import InputSpec

SUFFIXES = (".wav",)
# Inputs of these names take the sampling rate.
RATES = ("sr", "sampling_rate", "sample_rate")


def read(folder: Path, inputs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Feeds without a batch axis, sorted by path.

    Channels are averaged. Where the model has a free length, a file is a sample; where it is fixed,
    a sample is a window of it, without overlap: a rest at the end is left out, and a file that is
    shorter ends in silence.

    Raises:
        CalibrationError: a file is no PCM .wav, rates differ, or the model does not take sound.
    """
    spec = _sound(folder, inputs)
    assert spec.shape is not None, "only inputs of a known rank are taken for sound"
    length = spec.shape[-1]
    first: tuple[Path, int] | None = None
    for path in files_in(folder, SUFFIXES):
        samples, rate = _pcm(path)
        first = first or (path, rate)
        if rate != first[1]:
            raise CalibrationError(
                f"{path}: has {rate} samples a second, {first[0].name} has {first[1]}.",
                hint="Resample all files to the rate that the model was trained with.",
            )
        shape = (1,) * (len(spec.shape) - 2)
        for window in _windows(samples, length if isinstance(length, int) else None):
            feed = {spec.name: window.reshape(*shape, -1)}
            yield feed | {x.name: _rate(x, rate) for x in inputs if x is not spec}


def told(folder: Path, inputs: Sequence[InputSpec]) -> str:
    """What is done to the files, for the report."""
    shape = _sound(folder, inputs).shape
    fixed = shape is not None and isinstance(shape[-1], int)
    return f"mono, in windows of {shape[-1]}" if fixed and shape else "mono"


def _sound(folder: Path, inputs: Sequence[InputSpec]) -> InputSpec:
    """The input that takes samples: (batch, length) or (batch, 1, length), single precision."""
    others = [spec for spec in inputs if spec.name not in RATES]
    if len(others) == 1:
        (spec,) = others
        shape = spec.shape or ()
        mono = len(shape) == 2 or (len(shape) == 3 and shape[1] == 1)
        if spec.dtype == np.float32 and mono:
            return spec
    listed = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
    raise CalibrationError(
        f"{folder}: .wav files fit an input float32 (n, length) or (n, 1, length); "
        f"the model has {listed}.",
        hint="Compute what it takes, such as spectrograms, in a SCRIPT.py that yields it.",
    )


def _rate(spec: InputSpec, rate: int) -> np.ndarray:
    shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape or ())
    return np.full(shape, rate, dtype=spec.dtype)


def _windows(samples: np.ndarray, length: int | None) -> Iterator[np.ndarray]:
    if length is None:
        yield samples
        return
    if len(samples) < length:
        samples = np.pad(samples, (0, length - len(samples)))
    for start in range(0, len(samples) - length + 1, length):
        yield samples[start : start + length]


def _pcm(path: Path) -> tuple[np.ndarray, int]:
    """Samples (length,) float32, the mean over channels, and how many there are a second."""
    try:
        with wave.open(io.BytesIO(read_bytes(path))) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
        frames = raw.reshape(-1, channels, width)
        if not len(frames):
            raise ValueError("it holds no samples")
        return _levels(frames, width).mean(axis=1).astype(np.float32), rate
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise CalibrationError(
            f"{path}: cannot be read: {error}.",
            hint="Convert it to PCM: `ffmpeg -i IN -c:a pcm_s16le OUT.wav`.",
        ) from error


def _levels(frames: np.ndarray, width: int) -> np.ndarray:
    """Bytes (length, channels, width) as numbers (length, channels) in [-1, 1)."""
    if width == 1:
        return (frames[..., 0].astype(np.float64) - 128) / 128
    whole = np.zeros((*frames.shape[:2], 4), np.uint8)
    whole[..., 4 - width :] = frames  # the high bytes of 32: they hold the sign
    return whole.view("<i4")[..., 0] / 2.0**31
