"""Stored tensors that several nodes read: one mask if all see it alike, else nobody is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from onnx_ecp.layers.layer import Layer, Skip
from onnx_ecp.layers.trace import Scope

_MOST_NAMED = 5


def refuse_shared(candidates: Sequence[Layer], scope: Scope) -> dict[str, Skip]:
    """The layers that cannot be pruned because of who else reads their weight, by layer name.

    Layers that see one tensor in the same way (same steps, scale and shape) may share it; any
    other reader, whatever it does with the tensor, would be changed behind its back.
    """
    by_tensor: dict[str, list[Layer]] = {}
    for layer in candidates:
        by_tensor.setdefault(layer.weight.tensor, []).append(layer)
    refused = {}
    for tensor, layers in by_tensor.items():
        readers = _readers(scope, tensor)
        alike = len({layer.weight for layer in layers}) == 1
        if alike and len(readers) == len(layers):
            continue
        for layer in layers:
            refused[layer.name] = Skip(layer.name, layer.op, _reason(layer, readers))
    return refused


def _readers(scope: Scope, tensor: str) -> list[tuple[str, str]]:
    """(name, description) of all readers of a stored tensor, once per use."""
    return [_described(reader, scope.names) for reader in scope.readers(scope.tensors[tensor])]


def _described(reader: gs.Node | str, names: Mapping[int, str]) -> tuple[str, str]:
    if isinstance(reader, str):
        return "", reader
    name = names[id(reader)]
    return name, f"{reader.op} {name!r}"


def _reason(layer: Layer, readers: list[tuple[str, str]]) -> str:
    others = list(dict.fromkeys(text for name, text in readers if name != layer.name))
    if not others:
        return f"its weight {layer.weight.tensor!r} is read by it in a second place, too"
    named = ", ".join(others[:_MOST_NAMED])
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    return (
        f"its weight {layer.weight.tensor!r} is shared with {named}{more}, "
        "which would not see it in the same way"
    )
