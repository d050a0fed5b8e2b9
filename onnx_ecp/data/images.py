"""A folder of images: resized, cropped and normalised as preprocessor_config.json in it says.

Without that file as is usual for ImageNet: the shorter side becomes 8/7 of the model's, the centre
is cut out, and colours are normalised by ImageNet's mean and spread. The report says what was done.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_ecp.data.feeds import files_in, package
from onnx_ecp.data.untrusted import check_budget, read_bytes
from onnx_ecp.errors import CalibrationError
from onnx_ecp.graph import InputSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CONFIG = "preprocessor_config.json"
# Where the model leaves its size free.
USUAL_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BILINEAR = 2


@dataclass(frozen=True)
class Steps:
    """What is done to an image.

    Args:
        shorter: length of the shorter side after resizing; None: ``size`` says both.
        size: (height, width) after resizing, where ``shorter`` is None; None: no resizing.
        crop: (height, width) of the centre that is cut out; None: no cropping.
        scale: what bytes are multiplied by.
        mean: by channel, taken off after scaling.
        std: by channel, divided by at the end.
        resample: Pillow's number of the interpolation.
        usual: nothing said so: it is the usual.
    """

    shorter: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    usual: bool

    def __str__(self) -> str:
        parts = [f"shorter side {self.shorter}"] if self.shorter else []
        parts += [f"resized to {self.size[0]} x {self.size[1]}"] if self.size else []
        parts += [f"centre {self.crop[0]} x {self.crop[1]}"] if self.crop else []
        parts.append(f"times {self.scale:.4g}")
        if any(self.mean) or any(std != 1 for std in self.std):
            mean, std = (" ".join(f"{x:.4g}" for x in xs) for xs in (self.mean, self.std))
            parts.append(f"mean {mean}, spread {std}")
        return ", ".join(parts) + (f": the usual, as {CONFIG} is not there" if self.usual else "")


def read(folder: Path, inputs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Feeds (channels, height, width) or (height, width, channels), as the model has them.

    Raises:
        CalibrationError: the model does not take images, a file is none, or Pillow is missing.
    """
    spec, channels, last, _ = _image_input(folder, inputs)
    steps = steps_for(folder, inputs)
    package("PIL", f"{folder}: a folder of images", "pillow")
    files = files_in(folder, SUFFIXES)
    total = 0
    for path in files:
        image = _prepared(path, steps, "L" if channels == 1 else "RGB")
        array = np.asarray(image, np.float32).reshape(image.height, image.width, channels)
        if spec.dtype == np.uint8:
            array = array.astype(np.uint8)
        else:
            mean, std = (np.asarray(x, np.float32) for x in (steps.mean, steps.std))
            array = ((array * np.float32(steps.scale) - mean) / std).astype(spec.dtype)
        total += array.nbytes
        check_budget(total, str(folder))
        yield {spec.name: array if last else np.ascontiguousarray(array.transpose(2, 0, 1))}


def told(folder: Path, inputs: Sequence[InputSpec]) -> str:
    """What is done to the images, for the report."""
    return str(steps_for(folder, inputs))


def steps_for(folder: Path, inputs: Sequence[InputSpec]) -> Steps:
    """What the folder's preprocessor_config.json says, else the usual."""
    spec, channels, _, size = _image_input(folder, inputs)
    place = folder / CONFIG
    steps = _configured(place, channels) if place.is_file() else _usual(channels, size)
    if spec.dtype == np.uint8:  # the model scales and normalises by itself
        zeros, ones = (0.0,) * channels, (1.0,) * channels
        return Steps(
            steps.shorter, steps.size, steps.crop, 1.0, zeros, ones, steps.resample, steps.usual
        )
    return steps


def _usual(channels: int, size: tuple[int, int]) -> Steps:
    mean = MEAN if channels == 3 else (float(np.mean(MEAN)),)
    std = STD if channels == 3 else (float(np.mean(STD)),)
    return Steps(round(max(size) * 8 / 7), None, size, 1 / 255, mean, std, _BILINEAR, True)


def _configured(place: Path, channels: int) -> Steps:
    try:
        said = json.loads(read_bytes(place))
        resize, crop = said.get("do_resize", True), said.get("do_center_crop", "crop_size" in said)
        size = said.get("size", USUAL_SIZE) if resize else None
        shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
        if isinstance(size, int) and crop:
            shortest = size
        normal = said.get("do_normalize", True)
        return Steps(
            None if shortest is None else int(shortest),
            _pair(size) if size is not None and shortest is None else None,
            _pair(said.get("crop_size", USUAL_SIZE)) if crop else None,
            float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
            _colours(said["image_mean"], channels) if normal else (0.0,) * channels,
            _colours(said["image_std"], channels) if normal else (1.0,) * channels,
            int(said.get("resample", _BILINEAR)),
            False,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CalibrationError(
            f"{place}: cannot be read: {type(error).__name__}: {error}.",
            hint="It has size, crop_size, image_mean and image_std, as save_pretrained writes it.",
        ) from error


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return int(size), int(size)


def _colours(values: Any, channels: int) -> tuple[float, ...]:
    found = tuple(float(x) for x in values)
    if len(found) != channels:
        raise ValueError(f"{len(found)} colours, the model has {channels}")
    return found


def _prepared(path: Path, steps: Steps, mode: str) -> Any:
    """The image as it is cut out, in 8 bits a channel."""
    from PIL import Image, ImageOps

    bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(read_bytes(path))) as opened:
                image = ImageOps.exif_transpose(opened).convert(mode)
        if steps.shorter:
            factor = steps.shorter / min(image.size)
            image = image.resize(
                (
                    max(int(image.width * factor), steps.shorter),
                    max(int(image.height * factor), steps.shorter),
                ),
                steps.resample,
            )
        elif steps.size:
            image = image.resize(steps.size[::-1], steps.resample)
        if steps.crop:
            height, width = steps.crop
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        return image
    except (OSError, ValueError, SyntaxError, *bombs) as error:
        raise CalibrationError(
            f"{path}: cannot be read: {error}.",
            hint="Remove it, or write it again as PNG or JPEG.",
        ) from error


def _image_input(
    folder: Path, inputs: Sequence[InputSpec]
) -> tuple[InputSpec, int, bool, tuple[int, int]]:
    """The model's only input, its channels, whether they come last, its (height, width)."""
    if len(inputs) == 1 and inputs[0].shape is not None and len(inputs[0].shape) == 4:
        (spec,) = inputs
        assert spec.shape is not None, "just seen"
        numbers = spec.dtype is not None and (spec.dtype.kind == "f" or spec.dtype == np.uint8)
        for axis, last in ((1, False), (3, True)):
            channels = spec.shape[axis]
            if numbers and isinstance(channels, int) and channels in (1, 3):
                place = spec.shape[1:3] if last else spec.shape[2:4]
                height, width = (x if isinstance(x, int) else USUAL_SIZE for x in place)
                return spec, channels, last, (height, width)
    listed = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
    raise CalibrationError(
        f"{folder}: images fit one input (n, 3, height, width) or (n, height, width, 3), or of one "
        f"channel; the model has {listed}.",
        hint="Compute what it takes in a SCRIPT.py that yields it.",
    )
