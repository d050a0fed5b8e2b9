"""The state of a walk along the graph, on which units are followed from operator to operator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnx_ecp.layers.trace import Scope, Traced
from onnx_ecp.units.union_find import Axis, Marks

Sizes = tuple[np.ndarray | None, ...]
"""By entry of an integer tensor, the marks that it counts; None where it counts no units."""


class NotFollowed(Exception):
    """Units cannot be followed through an operator; the message says why, for the user.

    Args:
        message: why.
        root: where the way of another operand ended before, which is why.
    """

    def __init__(self, message: str, root: str = "") -> None:
        super().__init__(message)
        self.root = root


@dataclass(frozen=True)
class Slot:
    """An axis of a stored tensor, as one operator input sees it, along which units lie.

    Args:
        node: first output of the operator.
        index: which of its inputs.
        axis: of what the operator sees.
        constant: the stored tensor behind that input.
        marks: (length,), the mark of every entry; in a ``Structure`` the unit, -1 for none.
    """

    node: str
    index: int
    axis: int
    constant: Traced
    marks: np.ndarray


@dataclass(frozen=True)
class Count:
    """A number in the graph that says how many units there are.

    Args:
        node: first output of the operator that holds it.
        kind: "shape" (target of a Reshape), "part" (of a target that is computed), "rest" (the
            same, but of what is merged with axes of any size), "stay" (the same, but it must not
            follow), "split" (sizes of a Split), "starts" or "ends" (of a Slice), "group" (of a
            Conv) or "num_groups" (of a GroupNormalization).
        entry: which of several numbers; -1 where all of them have to be written again because they
            are computed from the number that is counted.
        marks: what is counted, as in a ``Slot``.
        sizes: all of the numbers, as the operator has or implies them.
    """

    node: str
    kind: str
    entry: int
    marks: np.ndarray
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Axes of a tensor that holds parts (queries, keys, values) side by side, all equally wide.

    Args:
        parts: the axis along which the parts lie.
        index: the axis of the units.
        marks: (parts, length), the mark of every entry of every part.
    """

    parts: int
    index: int
    marks: np.ndarray


@dataclass
class Walk:
    """What is known when the walk reaches a node: all about what is in front of it.

    Args:
        scope: the main graph of the model.
        shapes: of all tensors; the batch size of one run stands for any.
        inside: whether units are the dimensions of heads instead of the heads.
        heads: marks of dimensions of heads, where ``inside``.
        products: marks of queries and of keys that meet in a product, pair by pair.
        parts: by name of a tensor, parts whose k-th entries go together in the end.
        coupled: marks of such parts, (parts, length).
        summed: marks of units that are summed up, with the name of the operator.
        silent: names of tensors whose entries are zero where the rows that make them are.
        ended: by name of tensors to which units were not followed, where and why their way ended.
        computed: by name of an integer tensor, the marks that its values are computed from in some
            other way than in proportion.
    """

    scope: Scope
    shapes: Mapping[str, tuple[int, ...]]
    inside: bool = False
    heads: list[int] = field(default_factory=list)
    products: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    parts: dict[str, Parts] = field(default_factory=dict)
    coupled: list[np.ndarray] = field(default_factory=list)
    summed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    marks: Marks = field(default_factory=Marks)
    axes: dict[str, Axis] = field(default_factory=dict)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    computed: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def axis(self, tensor: gs.Tensor) -> Axis | None:
        """Where the units of a tensor lie, if it has any."""
        return self.axes.get(tensor.name)

    def marks_of(self, name: str) -> Iterator[np.ndarray]:
        """Marks of the units that a tensor has, or counts."""
        if name in self.axes:
            yield self.axes[name].marks
        if name in self.parts:
            yield self.parts[name].marks.reshape(-1)
        yield from (marks for marks in self.sizes.get(name, ()) if marks is not None)
        yield from self.computed.get(name, ())

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            Refused: nobody knows it.
        """
        shape = self.shapes.get(tensor.name)
        if shape is None:
            raise NotFollowed(f"the shape of {tensor.name!r} is not known")
        return shape

    def constant(self, tensor: gs.Tensor) -> Traced | None:
        """The stored tensor behind an input; None where there is none that can be edited."""
        traced = self.scope.trace(tensor)
        return traced if isinstance(traced, Traced) else None

    def slot(self, node: gs.Node, index: int, axis: int, marks: np.ndarray) -> None:
        """Note that an input of a node is stored and has units on one axis.

        Raises:
            Refused: it is not stored, or its length is another.
        """
        constant = self.constant(node.inputs[index])
        if constant is None:
            name = node.inputs[index].name
            raise NotFollowed(
                f"its input {name!r} is not a stored tensor", self.ended.get(name, "")
            )
        if constant.seen_shape[axis] != len(marks):
            raise NotFollowed(
                f"its input {node.inputs[index].name!r} does not have one entry per unit"
            )
        self.slots.append(Slot(node.outputs[0].name, index, axis, constant, marks))

    def meet(self, node: gs.Node, index: int, place: int, marks: np.ndarray) -> None:
        """An input that is broadcast against units which lie ``place`` (< 0) from the end.

        Raises:
            Refused: it has one entry per unit, and they are neither stored nor followed.
        """
        tensor = node.inputs[index]
        shape = self.shape(tensor)
        axis = self.axis(tensor)
        if len(shape) < -place or (shape[place] == 1 and len(marks) != 1):
            if axis is not None:
                raise NotFollowed("it repeats a unit")
            return
        if axis is None and shape[place] == 1 and not self.scope.is_constant(tensor):
            return  # one unit, and an activation of length 1: broadcast or not, the value is one
        if axis is None:
            self.slot(node, index, len(shape) + place, marks)
        elif axis.index != len(shape) + place or len(axis.marks) != len(marks):
            raise NotFollowed("it combines units of different axes")
        else:
            self.marks.join(axis.marks, marks)

    def integers(self, tensor: gs.Tensor) -> list[int] | None:
        """The values of a stored tensor of integers, where they are in the model itself."""
        stored = self.scope.stored(tensor)
        # graphsurgeon gives a number in the place of types that NumPy does not have.
        if stored is None or isinstance(stored.dtype, int):
            return None
        if not np.issubdtype(np.dtype(stored.dtype), np.integer):
            return None
        return [int(value) for value in np.ravel(stored.values)]

    def numbers(self, node: gs.Node, name: str, index: int) -> list[int] | None:
        """Integers that are an attribute in old opsets and input ``index`` in new ones."""
        if name in node.attrs:
            value = node.attrs[name]
            return list(value) if isinstance(value, Sequence) else [int(value)]
        if index < len(node.inputs) and node.inputs[index].name:
            return self.integers(node.inputs[index])
        return None
