"""A thin writer of standard ONNX nodes, for the reverse graph and for rows of layers.

Adjoint convention: the adjoint of a tensor of shape S has shape (P, *S); P, the probe axis, is
leading, so numpy broadcasting against forward tensors works unchanged (a forward tensor of lower
rank aligns at the right).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Fact:
    """What one run of the model told about a tensor: shape with a batch of at least two, dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype


# Element types of results that are not the type of an input.
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN")
_BOOL = (*_COMPARISONS, "And", "Not", "Or")
_RESULT = {**dict.fromkeys(_BOOL, np.bool_), "Shape": np.int64, "Size": np.int64}


class Builder:
    """Appends nodes to a graph: ``op.Mul(a, b)``, ``op.Transpose(x, perm=[1, 0])``.

    Any attribute that is not a method of this class is an operator of the standard domain. Numbers
    and arrays among the inputs become constants (floats in the dtype of the first float input).
    The result is one tensor, or a list of ``outputs=n`` tensors. ``None`` is an omitted input.

    Args:
        graph: the graph that is extended.
        facts: by tensor name, for the tensors of the forward graph.
        prefix: of all new names; two builders that write into one graph need two.
    """

    def __init__(self, graph: gs.Graph, facts: Mapping[str, Fact], prefix: str = "ecp") -> None:
        self.graph = graph
        self.facts = facts
        self.prefix = prefix
        self._count = 0
        self._dtypes: dict[str, np.dtype] = {}

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """Shape of a forward tensor as it was seen in the probing run (sizes may be the batch)."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        return self.facts[tensor.name].shape

    def rank(self, tensor: gs.Tensor) -> int:
        """Rank of a forward tensor."""
        return len(self.shape(tensor))

    def dtype(self, tensor: gs.Tensor) -> np.dtype:
        """Element type of a tensor; float32 where neither a fact nor an annotation tells it."""
        if tensor.name in self._dtypes:
            return self._dtypes[tensor.name]
        if tensor.name in self.facts:
            return self.facts[tensor.name].dtype
        own: np.dtype = np.dtype(tensor.dtype or np.float32)
        return own

    def fresh(self, stem: str) -> str:
        """A tensor name that nothing else has."""
        self._count += 1
        return f"{self.prefix}/{stem}_{self._count}"

    def const(self, value: Any, dtype: Any = None) -> gs.Constant:
        """A constant tensor; Python ints become int64, floats float32 unless ``dtype`` is given."""
        array = np.asarray(value)
        if dtype is None and array.dtype == np.float64 and not isinstance(value, np.ndarray):
            dtype = np.float32
        array = np.ascontiguousarray(array if dtype is None else array.astype(dtype))
        # ascontiguousarray turns scalars into vectors; scalars broadcast, vectors change ranks.
        return gs.Constant(self.fresh("const"), array.reshape(np.shape(value)))

    def op(
        self, op_type: str, *inputs: Any, outputs: int = 1, dtype: Any = None, **attrs: Any
    ) -> Any:
        """Append one node of the standard domain.

        Args:
            op_type: operator name.
            inputs: tensors, numbers, arrays, or None for an omitted input.
            outputs: number of outputs; a list is returned when it is not 1.
            dtype: element type of the result where it differs from the first tensor input's.
            attrs: attributes.
        """
        base = np.dtype(dtype) if dtype is not None else self._common_dtype(inputs)
        tensors = [self._tensor(x, base) for x in inputs]
        results = [gs.Variable(self.fresh(op_type.lower())) for _ in range(outputs)]
        self.graph.nodes.append(
            gs.Node(op_type, self.fresh(op_type), attrs, inputs=tensors, outputs=results)
        )
        for result in results:
            self._dtypes[result.name] = np.dtype(_RESULT.get(op_type, base))
        return results[0] if outputs == 1 else results

    def _common_dtype(self, inputs: Iterable[Any]) -> np.dtype:
        """The dtype of the first float tensor, else of the first that is not a condition."""
        dtypes = [self.dtype(x) for x in inputs if isinstance(x, gs.Tensor) and not x.is_empty()]
        floats = [d for d in dtypes if np.issubdtype(d, np.floating)]
        others = [d for d in dtypes if d != np.bool_]
        return next(iter(floats + others + dtypes), np.dtype(np.float32))

    def _tensor(self, x: Any, base: np.dtype) -> gs.Tensor:
        if x is None:
            return gs.Variable.empty()
        if isinstance(x, gs.Tensor):
            return x
        is_float = np.issubdtype(np.asarray(x).dtype, np.floating)
        return self.const(x, base if is_float else None)

    def __getattr__(self, name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(name)
        return lambda *inputs, **keywords: self.op(name, *inputs, **keywords)

    def rename(self, tensor: gs.Tensor, name: str) -> gs.Tensor:
        """Give a tensor that was built here a name of the caller's choice."""
        self._dtypes[name] = self.dtype(tensor)
        tensor.name = name
        return tensor

    # What nearly every rule needs.

    def cast(self, x: gs.Tensor, dtype: Any) -> gs.Tensor:
        """Cast to a numpy dtype."""
        dtype = np.dtype(dtype)
        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return self.op("Cast", x, dtype=dtype, to=int(to))

    def shape_of(self, x: gs.Tensor) -> gs.Tensor:
        """The run-time shape of a tensor, int64 vector."""
        return self.op("Shape", x, dtype=np.int64)

    def probes(self, g: gs.Tensor) -> gs.Tensor:
        """The run-time size [P] of the probe axis of an adjoint, int64 vector of one element."""
        return self.op("Shape", g, dtype=np.int64, start=0, end=1)

    def adjoint_shape(self, g: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
        """The run-time shape (P, *shape of x), int64 vector; g is any adjoint."""
        return self.op("Concat", self.probes(g), self.shape_of(x), axis=0)

    def reshape_like(self, values: gs.Tensor, g: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
        """The elements of ``values`` as an adjoint (P, *shape of x); g is any adjoint."""
        return self.op("Reshape", values, self.adjoint_shape(g, x), allowzero=1)

    def zeros(self, g: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
        """An adjoint (P, *shape of x) of zeros; g is any adjoint."""
        value = gs.Constant(self.fresh("zero"), np.zeros(1, self.dtype(g)))
        shape = self.adjoint_shape(g, x)
        return self.op("ConstantOfShape", shape, dtype=self.dtype(g), value=value)

    def pad(self, x: gs.Tensor, rank: int, axes: Iterable[int], amounts: Any) -> gs.Tensor:
        """Zeros around x along some axes; negative amounts cut.

        Args:
            x: of the given rank.
            rank: of x.
            axes: counted from the front.
            amounts: int64 (2 * number of axes), those before x first, then those behind it.
        """
        # Pad has an input for the axes, but ONNX Runtime (1.31) moves a Transpose through such a
        # Pad as if the amounts were those of all axes.
        before = np.array([*axes], np.int64)
        places = np.concatenate([before, before + rank])
        full = self.op("ScatterElements", np.zeros(2 * rank, np.int64), places, amounts)
        return self.op("Pad", x, full, None)

    def further_output(self, node: gs.Node, index: int, dtype: Any) -> gs.Tensor:
        """Output ``index`` of a forward node, asked for where the model did not."""
        while len(node.outputs) <= index:
            node.outputs.append(gs.Variable.empty())
        if node.outputs[index].is_empty():
            node.outputs[index] = gs.Variable(self.fresh(f"{node.op.lower()}_output{index}"))
            self._dtypes[node.outputs[index].name] = np.dtype(dtype)
        return node.outputs[index]

    def unbroadcast(self, g: gs.Tensor, x: gs.Tensor, of: gs.Tensor) -> gs.Tensor:
        """Sum g (P, *shape of ``of``) over what broadcasting x to the shape of ``of`` repeated.

        Returns an adjoint (P, *shape of x). Which axes were repeated is read off the probing run,
        so an axis of true size 1 that meets size 1 needs no sum.
        """
        return self.sum_to(g, self.shape(x), self.shape(of))

    def sum_to(self, g: gs.Tensor, small: Sequence[int], large: Sequence[int]) -> gs.Tensor:
        """Sum g (P, *large) over the axes along which ``small`` was broadcast to ``large``."""
        extra = len(large) - len(small)
        axes = [1 + i for i in range(extra)]
        axes += [1 + extra + i for i, d in enumerate(small) if d == 1 and large[extra + i] != 1]
        if not axes:
            return g
        g = self.op("ReduceSum", g, np.array(axes, np.int64), keepdims=1)
        if extra:
            g = self.op("Squeeze", g, np.arange(1, 1 + extra, dtype=np.int64))
        return g
