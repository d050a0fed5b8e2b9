"""Lines of text beside a tokenizer.json of Hugging Face: a line is a sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_ecp.data.feeds import package
from onnx_ecp.data.untrusted import read_bytes
from onnx_ecp.errors import CalibrationError
from onnx_ecp.graph import InputSpec

# What an encoding gives to inputs of these names.
GIVES: dict[str, Callable[[Any], Sequence[int]]] = {
    "input_ids": lambda encoding: encoding.ids,
    "attention_mask": lambda encoding: encoding.attention_mask,
    "token_type_ids": lambda encoding: encoding.type_ids,
    "position_ids": lambda encoding: range(len(encoding.ids)),
}
# A longest length beyond it means that there is none.
_ENDLESS = 10**6


def read(path: Path, inputs: Sequence[InputSpec]) -> Iterator[dict[str, np.ndarray]]:
    """Feeds (length,) by input name, one for each line that is not empty.

    The tokenizer's own truncation and padding are replaced: texts are cut at the model's fixed
    length, else at ``model_max_length`` of tokenizer_config.json; they are padded to a fixed length
    only.

    Raises:
        CalibrationError: no tokenizer.json lies beside the file, it cannot be read, or the model
            has inputs that it does not give.
    """
    unknown = [spec.name for spec in inputs if spec.name not in GIVES]
    if unknown:
        raise CalibrationError(
            f"{path}: text gives no {', '.join(map(repr, unknown))}.",
            hint=f"It gives {', '.join(GIVES)}; yield others in a SCRIPT.py.",
        )
    tokenizer = _tokenizer(path, inputs)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{path}: cannot be read: {error}.", hint="Write it in UTF-8, a sample in each line."
        ) from error
    for line in lines:
        if line.strip():
            encoding = tokenizer.encode(line)
            yield {
                spec.name: np.array(GIVES[spec.name](encoding), dtype=spec.dtype) for spec in inputs
            }


def _tokenizer(path: Path, inputs: Sequence[InputSpec]) -> Any:
    """The tokenizer beside the texts, which cuts and pads as the model wants it."""
    place = path.parent / "tokenizer.json"
    if not place.is_file():
        raise CalibrationError(
            f"{path}: no tokenizer.json lies beside it.",
            hint="Put the texts into the folder of the model's tokenizer.json.",
        )
    tokenizers = package("tokenizers", f"{path}: text", "tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(read_bytes(place).decode("utf-8"))
    except Exception as error:  # the package raises plain Exceptions
        raise CalibrationError(
            f"{place}: cannot be read: {error}.",
            hint="Save it with Tokenizer.save or save_pretrained.",
        ) from error
    padding = tokenizer.padding or {}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    fixed = {x.shape[1] for x in inputs if x.shape and len(x.shape) == 2}
    length = next((size for size in fixed if isinstance(size, int)), None)
    most = length or _most(place.with_name("tokenizer_config.json"))
    if most is not None:
        tokenizer.enable_truncation(most)
    if length is not None:
        names = ("pad_id", "pad_token", "pad_type_id", "direction")
        known = {name: padding[name] for name in names if name in padding}
        tokenizer.enable_padding(length=length, **(known or _pad(tokenizer, place)))
    return tokenizer


def _pad(tokenizer: Any, place: Path) -> dict[str, Any]:
    """The token of padding by its usual names."""
    for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"):
        number = tokenizer.token_to_id(token)
        if number is not None:
            return {"pad_id": number, "pad_token": token}
    raise CalibrationError(
        f"{place}: names no token of padding, and the model has a fixed length.",
        hint="Save the tokenizer with padding enabled.",
    )


def _most(config: Path) -> int | None:
    """The most tokens of one text; None where nothing says so."""
    try:
        most = json.loads(read_bytes(config)).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        return None
    return int(most) if isinstance(most, int | float) and 0 < most < _ENDLESS else None
