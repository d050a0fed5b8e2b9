"""Gemm, MatMul and Einsum: bilinear, so the adjoint of one factor is a product with the other."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import onnx_graphsurgeon as gs

from onnx_ecp.gradients.rules.registry import Unsupported, rule
from onnx_ecp.graph.builder import Builder


def _swap(op: Builder, x: gs.Tensor, rank: int) -> Any:
    """Exchange the last two axes of x, whose rank is given."""
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


@rule("Gemm")
def _gemm(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    if i == 2:
        c = op.unbroadcast(g[0], node.inputs[2], of=node.outputs[0])
        return op.Mul(c, float(node.attrs.get("beta", 1.0)))
    product = _gemm_left(op, node, g[0]) if i == 0 else _gemm_right(op, node, g[0])
    alpha = float(node.attrs.get("alpha", 1.0))
    return product if alpha == 1.0 else op.Mul(product, alpha)


def _gemm_left(op: Builder, node: gs.Node, g: Any) -> Any:
    a, b = node.inputs[:2]
    transposed = node.attrs.get("transB", 0)
    if not node.attrs.get("transA", 0):
        # One two-dimensional product for all probes, with the stored weight as it is.
        rows = op.Gemm(op.Flatten(g, axis=2), b, transB=1 - transposed)
        return op.reshape_like(rows, g, a)
    return op.MatMul(_swap(op, b, 2) if transposed else b, _swap(op, g, 3))


def _gemm_right(op: Builder, node: gs.Node, g: Any) -> Any:
    a = node.inputs[0]
    transposed = node.attrs.get("transA", 0)
    if node.attrs.get("transB", 0):
        return op.MatMul(_swap(op, g, 3), _swap(op, a, 2) if transposed else a)
    return op.MatMul(a if transposed else _swap(op, a, 2), g)


@rule("MatMul")
def _matmul(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    (a, b), (y,) = node.inputs, node.outputs
    if i == 0 and op.rank(b) == 2:
        # One two-dimensional product for all probes, with the stored weight as it is.
        rows = op.Gemm(op.Flatten(g[0], axis=op.rank(y)), b, transB=1)
        return op.reshape_like(rows, g[0], a)
    # A vector on the left is a row, a vector on the right a column.
    left, right = op.shape(a), op.shape(b)
    batch, g_y = op.shape(y), g[0]
    if len(right) == 1:
        right, b, g_y, batch = (*right, 1), op.Unsqueeze(b, [1]), op.Unsqueeze(g_y, [-1]), batch
    else:
        batch = batch[:-1]
    if len(left) == 1:
        left, a, g_y = (1, *left), op.Unsqueeze(a, [0]), op.Unsqueeze(g_y, [-2])
    else:
        batch = batch[:-1]
    if i == 0:
        product, small = op.MatMul(g_y, _swap(op, b, len(right))), left
    else:
        product, small = op.MatMul(_swap(op, a, len(left)), g_y), right
    product = op.sum_to(product, small, (*batch, *small[-2:]))
    return op.reshape_like(product, g_y, node.inputs[i])


@rule("Einsum")
def _einsum(op: Builder, node: gs.Node, g: list[gs.Tensor | None], i: int) -> gs.Tensor | None:
    """Exchange the operand with the output; indices that only the operand has need a factor."""
    operands, result = _parse_einsum(node.attrs["equation"], len(node.inputs))
    if any("..." in t for t in operands):
        operands, result = _spell_ellipsis(op, node, operands, result)
    own, x = operands[i], node.inputs[i]
    others = [t for j, t in enumerate(operands) if j != i]
    factors = [t for j, t in enumerate(node.inputs) if j != i]
    free = [c for c in ascii_letters if c not in result + "".join(operands)]
    target = ""
    for axis, letter in enumerate(own):
        size = op.Shape(x, start=axis, end=axis + 1)
        if letter in target:
            # A diagonal: the unit matrix puts the adjoint back onto it.
            target += free.pop()
            factors.append(op.EyeLike(op.Expand(op.const(0.0, op.dtype(x)), op.Tile(size, [2]))))
            others.append(letter + target[-1])
            continue
        target += letter
        if letter not in result and not any(letter in t for t in others):
            # A sum: every element gets the adjoint.
            factors.append(op.Expand(op.const(1.0, op.dtype(x)), size))
            others.append(letter)
    probe = free.pop()
    equation = ",".join([probe + result, *others]) + "->" + probe + target
    return op.Einsum(g[0], *factors, equation=equation)


def _parse_einsum(equation: str, count: int) -> tuple[list[str], str]:
    """Operands and result as index strings, the result spelled out."""
    left, _, result = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    assert len(operands) == count, "the model was checked"
    if "->" not in equation:
        letters = left.replace(",", "").replace(".", "")
        once = sorted(c for c in set(letters) if letters.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    return operands, result


def _spell_ellipsis(
    op: Builder, node: gs.Node, operands: list[str], result: str
) -> tuple[list[str], str]:
    """Letters in place of the dots, which must mean the same axes in every operand."""
    spans = set()
    for x, t in zip(node.inputs, operands, strict=True):
        if "..." in t:
            start, width = t.index("..."), op.rank(x) - len(t) + 3
            spans.add(op.shape(x)[start : start + width])
    if len(spans) != 1:
        raise Unsupported("an ellipsis that broadcasts")
    free = [c for c in ascii_letters if c not in result + "".join(operands)]
    dots = "".join(free[: len(spans.pop())])
    return [t.replace("...", dots) for t in operands], result.replace("...", dots)
