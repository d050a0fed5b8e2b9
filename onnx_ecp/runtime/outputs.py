"""Outputs that are no tensors, taken apart into arrays: sequences, maps, optionals.

ONNX Runtime gives them as lists, dictionaries and None. Scikit-learn's converter makes such outputs
by default: a list with a dictionary of class scores for every sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_ecp.errors import ModelError


def arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs as arrays by name.

    >>> arrays({"p": [{0: 0.25, 1: 0.75}, {0: 0.5, 1: 0.5}]})["p"].tolist()
    [[0.25, 0.75], [0.5, 0.5]]
    >>> arrays({"s": [np.zeros(2), np.ones(3)]}).keys()
    dict_keys(['s[0]', 's[1]'])

    Args:
        values: as ``Session.run`` gives them. A map is the array of its values, maps with the same
            keys are one array with a row for each; elements of other sequences are arrays of
            their own, called NAME[i]; an optional without a value is an empty array.

    Raises:
        ModelError: an output is something else, such as a sparse tensor.
    """
    return {n: array for name, value in values.items() for n, array in _parts(name, value).items()}


def _parts(name: str, value: Any) -> dict[str, np.ndarray]:
    match value:
        case np.ndarray():
            return {name: value}
        case None:
            return {name: np.zeros(0, np.float32)}
        case dict() if all(np.ndim(v) == 0 for v in value.values()):
            return {name: np.array(list(value.values()))}
        case list() if _same_keys(value):
            return {name: np.array([list(row.values()) for row in value])}
        case list():
            return arrays({f"{name}[{i}]": part for i, part in enumerate(value)})
        case _ if np.isscalar(value):
            return {name: np.asarray(value)}
    raise ModelError(
        f"output {name!r} is no tensor, nor made of tensors: {type(value).__name__}.",
        hint="Export the model with tensors as outputs.",
    )


def _same_keys(rows: list[Any]) -> bool:
    """Whether all are maps of the same keys in the same order."""
    maps = [list(row) for row in rows if isinstance(row, dict)]
    return len(maps) == len(rows) > 0 and all(keys == maps[0] for keys in maps)
