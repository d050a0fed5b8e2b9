"""One look at each version of a model: imported and searched for layers once, whoever asks.

A version is told by all that a look at it sees: nodes, declared types, functions, and of stored
tensors what they are called and how large they are; values only of the small ones, which shapes are
made of. What is kept is kept while a run lasts: of the graphs, which hold a model's weights, one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import blake2b
from math import prod
from typing import Any, TypeVar

import onnx

from onnx_ecp.graph.external import is_external

T = TypeVar("T")
# Values of larger stored tensors are weights.
_SMALL = 2**10
# Results of so many versions are kept that hold no weights.
_MOST = 8


@dataclass
class _Kept:
    light: dict[tuple[str, bytes, int], Any] = field(default_factory=dict)
    heavy: dict[tuple[str, bytes, int], Any] = field(default_factory=dict)


_CURRENT: ContextVar[_Kept | None] = ContextVar("looks", default=None)


@contextmanager
def one_look_each() -> Iterator[None]:
    """Within, what ``once`` is asked for again is what it was."""
    token = _CURRENT.set(_Kept())
    try:
        yield
    finally:
        _CURRENT.reset(token)


def once(what: str, proto: onnx.ModelProto, make: Callable[[], T], *, heavy: bool) -> T:
    """What is made of a version of a model.

    Args:
        what: it is.
        proto: the model.
        make: makes it; nobody changes what it makes.
        heavy: whether it holds the model's weights: then it is that of this very object alone,
            which must not get other weights afterwards.
    """
    kept = _CURRENT.get()
    if kept is None:
        return make()
    key = (what, version(proto), id(proto) if heavy else 0)
    place = kept.heavy if heavy else kept.light
    if key in place:
        found: T = place[key][1]
        return found
    while len(place) >= (1 if heavy else _MOST):
        del place[next(iter(place))]
    made = make()
    place[key] = (proto if heavy else None), made  # as long as it lives, its id is its own
    return made


def version(proto: onnx.ModelProto) -> bytes:
    """The digest of all of a model but its weights."""
    seen = blake2b(digest_size=20)

    def add(*parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else part.SerializeToString()
            seen.update(len(data).to_bytes(8, "little"))
            seen.update(data)

    graph = proto.graph
    add(repr((proto.ir_version, graph.name)).encode(), *proto.opset_import, *proto.functions)
    add(*graph.node, b"inputs", *graph.input, b"outputs", *graph.output, b"infos")
    add(*graph.value_info, b"stored", *graph.sparse_initializer)
    for tensor in graph.initializer:
        if prod(tensor.dims) <= _SMALL and not is_external(tensor):
            add(tensor)
        else:
            facts = (tensor.name, list(tensor.dims), tensor.data_type, tensor.data_location)
            add(repr(facts).encode())
    return seen.digest()
