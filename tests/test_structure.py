"""Units: what belongs to them is found, they leave without a trace, and nothing else changes."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import onnx_ecp
from onnx_ecp.api import gain
from onnx_ecp.api.inspect import inspect
from onnx_ecp.errors import TargetError, UsageError
from onnx_ecp.evaluation.latency import Latency
from onnx_ecp.graph import Model, load
from onnx_ecp.layers import find_layers
from onnx_ecp.report.headline import headline
from onnx_ecp.units import cleanup, cut, find_structure, inferred_shapes, shapes_of_a_run
from onnx_ecp.units import shrink as smaller
from onnx_ecp.units.choice import budget, choose, multiples
from onnx_ecp.units.cleanup import clean_up, largest_difference

HEADER = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'
# What attentions have in common: Q, K and V of tokens; heads apart; what they see, with no scale.
QKV = """q = MatMul(x, Q)
        k = MatMul(x, K)
        v = MatMul(x, V)"""
HEADS_APART = """qs = Reshape(q, shape)
        ks = Reshape(k, shape)
        vs = Reshape(v, shape)
        qt = Transpose<perm = [0, 2, 1, 3]>(qs)
        kt = Transpose<perm = [0, 2, 3, 1]>(ks)
        vt = Transpose<perm = [0, 2, 1, 3]>(vs)"""
PLAIN_HEADS = f"""{HEADS_APART}
        l = MatMul(qt, kt)
        p = Softmax(l)
        o = MatMul(p, vt)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)"""
# Name: (signature, body, initializer shapes, units by group).
NETWORKS = {
    "Gemm chain": (
        "float[N, 5] x",
        """h = Gemm<transB = 1>(x, W, b)
        a = Relu(h)
        k = Gemm(a, V, c)
        t = Tanh(k)
        y = Gemm(t, U)""",
        {"W": (6, 5), "b": (6,), "V": (6, 4), "c": (1, 4), "U": (4, 3)},
        [6, 4],
    ),
    "MatMul, scale and bias broadcast, on tokens": (
        "float[N, 3, 5] x",
        """h = MatMul(x, W)
        s = Mul(h, scale)
        z = Add(b, s)
        a = Sigmoid(z)
        y = MatMul(a, V)""",
        {"W": (5, 6), "scale": (1, 6), "b": (6,), "V": (6, 4)},
        [6],
    ),
    "weight on the left": (
        "float[N, 5, 3] x",
        """h = MatMul(W, x)
        z = Add(h, b)
        a = Relu(z)
        y = MatMul(V, a)""",
        {"W": (6, 5), "b": (6, 1), "V": (4, 6)},
        [6],
    ),
    "ReduceSum over products": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        t = Gemm(x, V)
        m = Mul(h, t)
        one = Constant<value_ints = [1]>()
        s = ReduceSum(m, one)
        y = MatMul(s, U)""",
        {"W": (5, 6), "b": (6,), "V": (5, 6), "U": (1, 3)},
        [6],
    ),
    "ReduceSum behind a bias and Tanh": (
        "float[N, 4, 5] x",
        """h = MatMul(x, W)
        k = Add(b, h)
        t = Tanh(k)
        last = Constant<value_ints = [-1]>()
        s = ReduceSum(t, last)
        q = ReduceL1<axes = [2], keepdims = 0>(t)
        u = Unsqueeze(q, last)
        z = Add(s, u)
        y = MatMul(z, U)""",
        {"W": (5, 6), "b": (6,), "U": (1, 3)},
        [6],
    ),
    "ReduceSum beside a layer": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        t = Relu(h)
        last = Constant<value_ints = [-1]>()
        s = ReduceSum(t, last)
        z = MatMul(t, V)
        y = Add(s, z)""",
        {"W": (5, 6), "b": (6,), "V": (6, 4)},
        [6],
    ),
    "MaxUnpool: channels of one MaxPool": (
        "float[N, 2, 8, 8] x",
        """h = Conv<pads = [1, 1, 1, 1]>(x, W)
        r = Relu(h)
        p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
        k = Conv<pads = [1, 1, 1, 1]>(p, V)
        s = Relu(k)
        w = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(s, i)
        y = Conv(w, U)""",
        {"W": (6, 2, 3, 3), "V": (6, 6, 3, 3), "U": (2, 6, 3, 3)},
        [6],
    ),
    "MatMul with a vector": (
        "float[N, 5] x",
        """h = MatMul(x, W)
        a = Tanh(h)
        y = MatMul(a, u)""",
        {"W": (5, 6), "u": (6,)},
        [6],
    ),
    "experts: batches of matrices": (
        "float[N, 1, 4, 5] x",
        """h = MatMul(x, W)
        k = Add(h, b)
        a = Sigmoid(k)
        m = MatMul(a, V)
        c = Relu(m)
        z = MatMul(c, U)
        y = ReduceMean<axes = [1], keepdims = 0>(z)""",
        {"W": (3, 5, 6), "b": (3, 1, 6), "V": (3, 6, 4), "U": (1, 3, 4, 2)},
        [6, 4],
    ),
    "BiasGelu": (
        "float[N, 5] x",
        """h = MatMul(x, W)
        a = com.microsoft.BiasGelu(h, b)
        y = MatMul(a, V)""",
        {"W": (5, 6), "b": (6,), "V": (6, 4)},
        [6],
    ),
    "SwiGLU: two producers": (
        "float[N, 3, 5] x",
        """g = MatMul(x, G)
        s = Sigmoid(g)
        w = Mul(g, s)
        u = MatMul(x, W)
        a = Mul(w, u)
        y = MatMul(a, V)""",
        {"G": (5, 6), "W": (5, 6), "V": (6, 4)},
        [6],
    ),
    "Conv, BatchNormalization, pools, Flatten": (
        "float[N, 2, 8, 8] x",
        """h = Conv<pads = [1, 1, 1, 1]>(x, W, b)
        n = BatchNormalization(h, g, o, m, v)
        a = Relu(n)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
        k = Conv(p, V)
        q = AveragePool<kernel_shape = [2, 2]>(k)
        f = Flatten(q)
        y = Gemm<transB = 1>(f, U, c)""",
        {
            "W": (6, 2, 3, 3),
            "b": (6,),
            "g": (6,),
            "o": (6,),
            "m": (6,),
            "v": (6,),
            "V": (4, 6, 3, 3),
            "U": (3, 4),
            "c": (3,),
        },
        [6, 4],
    ),
    "depthwise Conv": (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        a = Relu(h)
        d = Conv<group = 6, pads = [1, 1, 1, 1]>(a, D, e)
        r = Clip(d)
        k = Conv(r, V)
        y = GlobalAveragePool(k)""",
        {"W": (6, 2, 3, 3), "b": (6,), "D": (12, 1, 3, 3), "e": (12,), "V": (4, 12, 1, 1)},
        [6],
    ),
    "grouped Conv: whole groups": (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        a = Relu(h)
        d = Conv<group = 3, pads = [1, 1, 1, 1]>(a, D, e)
        r = Sigmoid(d)
        k = Conv(r, V)
        y = GlobalAveragePool(k)""",
        {"W": (6, 2, 3, 3), "b": (6,), "D": (12, 2, 3, 3), "e": (12,), "V": (4, 12, 1, 1)},
        [3],
    ),
    "grouped Conv: channels of every group": (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        a = Relu(h)
        d = Conv<group = 2, pads = [1, 1, 1, 1]>(a, D, e)
        r = Sigmoid(d)
        k = Conv(r, V)
        y = GlobalAveragePool(k)""",
        {"W": (12, 2, 3, 3), "b": (12,), "D": (8, 6, 3, 3), "e": (8,), "V": (4, 8, 1, 1)},
        [6, 4],
    ),
    "grouped Conv of an input": (
        "float[N, 4, 6, 6] x",
        """d = Conv<group = 2>(x, D)
        r = Relu(d)
        k = Conv(r, V)
        y = GlobalAveragePool(k)""",
        {"D": (8, 2, 3, 3), "V": (4, 8, 1, 1)},
        [4],
    ),
    "residual addition": (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        a = Relu(h)
        k = Conv<pads = [1, 1, 1, 1]>(a, V)
        l = Relu(k)
        m = Conv<pads = [1, 1, 1, 1]>(l, U)
        s = Add(a, m)
        g = GlobalAveragePool(s)
        f = Flatten(g)
        y = Gemm(f, T)""",
        {
            "W": (6, 2, 3, 3),
            "b": (6,),
            "V": (5, 6, 3, 3),
            "U": (6, 5, 3, 3),
            "T": (6, 3),
        },
        [6, 5],
    ),
    "Concat of two producers and an input": (
        "float[N, 5] x",
        """h = Gemm(x, W)
        k = Gemm(x, V)
        a = Relu(h)
        c = Concat<axis = 1>(a, x, k)
        y = Gemm(c, U)""",
        {"W": (5, 4), "V": (5, 3), "U": (12, 2)},
        [4, 3],
    ),
    "Split of one producer": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        p, q = Split<axis = 1>(h)
        s = Sigmoid(p)
        a = Mul(s, q)
        y = Gemm(a, U)""",
        {"W": (5, 8), "b": (8,), "U": (4, 2)},
        [4],
    ),
    "attention: heads": (
        "float[N, 3, 5] x",
        QKV
        + """
        shape = Constant<value = int64[4] {0, 0, 4, 2}>()
        """
        + HEADS_APART
        + """
        l = MatMul(qt, kt)
        d = Div(l, root)
        p = Softmax<axis = -1>(d)
        o = MatMul(p, vt)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        back = Constant<value = int64[3] {0, 0, 8}>()
        m = Reshape(ot, back)
        y = MatMul(m, O)""",
        {"Q": (5, 8), "K": (5, 8), "V": (5, 8), "O": (8, 5), "root": ()},
        [4, 2, 2],
    ),
    "attention: one merged layer, biases, masked": (
        "float[N, 3, 5] x",
        """h = MatMul(x, W)
        z = Add(h, b)
        q, k, v = Split<axis = 2>(z)
        shape = Constant<value = int64[4] {0, 0, 2, 4}>()
        """
        + HEADS_APART
        + """
        l = MatMul(qt, kt)
        d = Mul(root, l)
        e = Add(d, mask)
        p = Softmax(e)
        o = MatMul(p, vt)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        back = Constant<value = int64[3] {0, -1, 8}>()
        m = Reshape(ot, back)
        y = MatMul(m, O)""",
        {"W": (5, 24), "b": (24,), "O": (8, 5), "root": (), "mask": (3, 3)},
        [2, 4, 4],
    ),
    "attention: shapes computed": (
        "float[N, 3, 5] x",
        QKV
        + """
        sizes = Shape(x)
        first = Constant<value = int64[1] {0}>()
        second = Constant<value = int64[1] {1}>()
        n = Gather(sizes, first)
        t = Gather(sizes, second)
        heads = Constant<value = int64[1] {2}>()
        size = Constant<value = int64[1] {3}>()
        all = Constant<value = int64[1] {6}>()
        shape = Concat<axis = 0>(n, t, heads, size)
        """
        + PLAIN_HEADS
        + """
        back = Concat<axis = 0>(n, t, all)
        m = Reshape(ot, back)
        y = MatMul(m, O)""",
        {"Q": (5, 6), "K": (5, 6), "V": (5, 6), "O": (6, 5)},
        [2, 3, 3],
    ),
    "attention: sizes of another tensor": (
        "float[N, 3, 8] x",
        QKV
        + """
        sizes = Shape(x)
        first = Constant<value = int64[1] {0}>()
        second = Constant<value = int64[1] {1}>()
        third = Constant<value = int64[1] {2}>()
        n = Gather(sizes, first)
        t = Gather(sizes, second)
        c = Gather(sizes, third)
        heads = Constant<value = int64[1] {2}>()
        size = Div(c, heads)
        shape = Concat<axis = 0>(n, t, heads, size)
        """
        + PLAIN_HEADS
        + """
        back = Concat<axis = 0>(n, t, c)
        m = Reshape(ot, back)
        y = MatMul(m, O)""",
        {"Q": (8, 8), "K": (8, 8), "V": (8, 8), "O": (8, 5)},
        [2, 4, 4],
    ),
    "attention: sizes of the units' own tensors": (
        "float[N, 3, 5] x",
        QKV
        + """
        sizes = Shape(v)
        zero = Constant<value = int64[1] {0}>()
        two = Constant<value = int64[1] {2}>()
        three = Constant<value = int64[1] {3}>()
        places = Slice(sizes, zero, two)
        c = Slice(sizes, two, three)
        size = Div(c, two)
        shape = Concat<axis = 0>(places, two, size)
        """
        + PLAIN_HEADS
        + """
        m = Reshape(ot, sizes)
        y = MatMul(m, O)""",
        {"Q": (5, 8), "K": (5, 8), "V": (5, 8), "O": (8, 5)},
        [2, 4, 4],
    ),
    "ConvTranspose, as in the decoder of a U-Net": (
        "float[N, 2, 6, 6] x",
        """h = Conv<pads = [1, 1, 1, 1]>(x, W, b)
        a = Relu(h)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
        u = ConvTranspose<strides = [2, 2]>(p, V, c)
        t = Tanh(u)
        j = Concat<axis = 1>(t, a)
        y = Conv(j, U)""",
        {"W": (6, 2, 3, 3), "b": (6,), "V": (6, 5, 2, 2), "c": (5,), "U": (3, 11, 1, 1)},
        [6, 5],
    ),
    "ConvTranspose, depthwise": (
        "float[N, 2, 6, 6] x",
        """h = Conv<pads = [1, 1, 1, 1]>(x, W, b)
        a = Sigmoid(h)
        u = ConvTranspose<group = 6, strides = [2, 2]>(a, V)
        t = Tanh(u)
        y = ConvTranspose(t, U)""",
        {"W": (6, 2, 3, 3), "b": (6,), "V": (6, 1, 3, 3), "U": (6, 3, 1, 1)},
        [6],
    ),
    "Conv, flattened by a multiple of the channels of the input": (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        sizes = Shape(x)
        first = Constant<value = int64[1] {0}>()
        second = Constant<value = int64[1] {1}>()
        n = Gather(sizes, first)
        c = Gather(sizes, second)
        factor = Constant<value = int64[1] {48}>()
        many = Mul(c, factor)
        shape = Concat<axis = 0>(n, many)
        f = Reshape(h, shape)
        y = MatMul(f, V)""",
        {"W": (6, 2, 3, 3), "b": (6,), "V": (96, 4)},
        [6],
    ),
    "Conv, flattened by the product of its sizes": (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        sizes = Shape(h)
        first = Constant<value = int64[1] {1}>()
        last = Constant<value = int64[1] {4}>()
        own = Slice(sizes, first, last)
        many = ReduceProd(own)
        all = Constant<value = int64[1] {-1}>()
        shape = Concat<axis = 0>(all, many)
        f = Reshape(h, shape)
        y = MatMul(f, V)""",
        {"W": (6, 2, 3, 3), "b": (6,), "V": (96, 4)},
        [6],
    ),
    "attention: one head": (
        "float[N, 3, 5] x",
        QKV
        + """
        kt = Transpose<perm = [0, 2, 1]>(k)
        l = MatMul(q, kt)
        p = Softmax<axis = 2>(l)
        o = MatMul(p, v)
        y = MatMul(o, O)""",
        {"Q": (5, 4), "K": (5, 4), "V": (5, 6), "O": (6, 5)},
        [6, 4],
    ),
    "shared bias": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        a = Relu(h)
        k = Gemm(a, V, b)
        r = Relu(k)
        y = Gemm(r, U)""",
        {"W": (5, 6), "V": (6, 6), "b": (6,), "U": (6, 2)},
        [6, 6],
    ),
    "weight behind a Transpose": (
        "float[N, 5] x",
        """t = Transpose<perm = [1, 0]>(W)
        h = MatMul(x, t)
        a = Relu(h)
        y = MatMul(a, V)""",
        {"W": (6, 5), "V": (6, 4)},
        [6],
    ),
    "gated unit by Slices": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        zero = Constant<value = int64[1] {0}>()
        half = Constant<value = int64[1] {6}>()
        most = Constant<value = int64[1] {9223372036854775807}>()
        one = Constant<value = int64[1] {1}>()
        u = Slice(h, zero, half, one)
        g = Slice(h, half, most, one)
        s = Sigmoid(g)
        m = Mul(u, s)
        y = MatMul(m, V)""",
        {"W": (5, 12), "b": (12,), "V": (6, 3)},
        [6],
    ),
    "gated unit by a Slice from the end": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        zero = Constant<value = int64[1] {0}>()
        half = Constant<value = int64[1] {-6}>()
        most = Constant<value = int64[1] {12}>()
        one = Constant<value = int64[1] {-1}>()
        u = Slice(h, zero, half, one)
        g = Slice(h, half, most, one)
        s = Tanh(g)
        m = Mul(u, s)
        y = MatMul(m, V)""",
        {"W": (5, 12), "b": (12,), "V": (6, 3)},
        [6],
    ),
    "chunk by shape arithmetic, halves read apart": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        sh = Shape(h)
        i = Constant<value = int64 {1}>()
        n = Gather(sh, i)
        two = Constant<value = int64 {2}>()
        n1 = Add(n, i)
        k = Div(n1, two)
        one = Constant<value = int64[1] {1}>()
        twice = Constant<value = int64[1] {2}>()
        zero = Constant<value = int64[1] {0}>()
        k1 = Mul(k, one)
        k2 = Mul(k, twice)
        u = Slice(h, zero, k1, one)
        v = Slice(h, k1, k2, one)
        p = Gemm(u, V, c)
        q = Gemm(v, U, d)
        t = Add(p, q)
        r = Relu(t)
        y = MatMul(r, Q)""",
        {"W": (5, 12), "b": (12,), "V": (6, 4), "c": (4,), "U": (6, 4), "d": (4,), "Q": (4, 3)},
        [6, 6, 4],
    ),
    "softmax over branches": (
        "float[N, 5] x",
        """h = Gemm(x, W, b)
        shape = Constant<value = int64[3] {0, 2, 6}>()
        r = Reshape(h, shape)
        s = Softmax<axis = 1>(r)
        m = Mul(r, s)
        axes = Constant<value = int64[1] {1}>()
        q = ReduceSum<keepdims = 0>(m, axes)
        y = MatMul(q, V)""",
        {"W": (5, 12), "b": (12,), "V": (6, 3)},
        [6],
    ),
    "queries, keys and values in one tensor, unbound": (
        "float[N, 4, 6] x",
        """h = MatMul(x, W)
        shape = Constant<value = int64[5] {0, 4, 3, 3, 2}>()
        r = Reshape(h, shape)
        t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
        i = Constant<value = int64 {0}>()
        j = Constant<value = int64 {1}>()
        k = Constant<value = int64 {2}>()
        q = Gather(t, i)
        k1 = Gather(t, j)
        v = Gather(t, k)
        kt = Transpose<perm = [0, 1, 3, 2]>(k1)
        l = MatMul(q, kt)
        s = Softmax<axis = -1>(l)
        o = MatMul(s, v)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        flat = Constant<value = int64[3] {0, 4, -1}>()
        f = Reshape(ot, flat)
        y = MatMul(f, V)""",
        {"W": (6, 18), "V": (6, 4)},
        [3, 2],
    ),
    "queries, keys and values in one tensor, split": (
        "float[N, 4, 6] x",
        """h = MatMul(x, W)
        z = Add(h, b)
        shape = Constant<value = int64[5] {0, 4, 3, 2, 3}>()
        r = Reshape(z, shape)
        t = Transpose<perm = [0, 3, 2, 1, 4]>(r)
        axis = Constant<value_ints = [2]>()
        q1, k1, v1 = Split<axis = 2>(t)
        q = Squeeze(q1, axis)
        k = Squeeze(k1, axis)
        u = Squeeze(v1, axis)
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        l = MatMul(q, kt)
        d = Div(l, root)
        s = Softmax<axis = -1>(d)
        o = MatMul(s, u)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        flat = Constant<value = int64[3] {0, 4, -1}>()
        f = Reshape(ot, flat)
        y = MatMul(f, V)""",
        {"W": (6, 18), "b": (18,), "root": (), "V": (6, 4)},
        [2, 3],
    ),
    "attention: heads merged with samples": (
        "float[N, 3, 5] x",
        QKV
        + """
        shape = Constant<value = int64[4] {0, 0, 4, 2}>()
        qs = Reshape(q, shape)
        ks = Reshape(k, shape)
        vs = Reshape(v, shape)
        qt = Transpose<perm = [0, 2, 1, 3]>(qs)
        kt = Transpose<perm = [0, 2, 1, 3]>(ks)
        vt = Transpose<perm = [0, 2, 1, 3]>(vs)
        sizes = Shape(kt)
        first = Constant<value_ints = [0, 1]>()
        length = Constant<value_ints = [2]>()
        width = Constant<value_ints = [3]>()
        front = Gather(sizes, first)
        n = Gather(sizes, length)
        e = Gather(sizes, width)
        rest = Constant<value_ints = [-1]>()
        merged = Concat<axis = 0>(rest, n, e)
        apart = Concat<axis = 0>(front, e, n)
        km = Reshape(kt, merged)
        ku = Transpose<perm = [0, 2, 1]>(km)
        kr = Reshape(ku, apart)
        l = MatMul(qt, kr)
        p = Softmax<axis = -1>(l)
        o = MatMul(p, vt)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        back = Constant<value = int64[3] {0, 0, 8}>()
        m = Reshape(ot, back)
        y = MatMul(m, O)""",
        {"Q": (5, 8), "K": (5, 8), "V": (5, 8), "O": (8, 5)},
        [4, 2, 2],
    ),
    "channel shuffle": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        r = Relu(h)
        shape = Constant<value = int64[5] {0, 2, 4, 4, 4}>()
        s = Reshape(r, shape)
        t = Transpose<perm = [0, 2, 1, 3, 4]>(s)
        back = Constant<value = int64[4] {0, 8, 4, 4}>()
        u = Reshape(t, back)
        y = Conv(u, V)""",
        {"W": (8, 3, 1, 1), "V": (3, 8, 1, 1)},
        [4],
    ),
    "a gate expanded to the shape of its channels": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        r = Relu(h)
        p = GlobalAveragePool(r)
        q = Conv(p, G)
        g = Sigmoid(q)
        sh = Shape(r)
        e = Expand(g, sh)
        m = Mul(r, e)
        y = Conv(m, V)""",
        {"W": (6, 3, 1, 1), "G": (6, 6, 1, 1), "V": (3, 6, 1, 1)},
        [6],
    ),
    "Resize to sizes of another map": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        r = Relu(h)
        sh = Shape<end = 2>(r)
        hw = Constant<value = int64[2] {8, 8}>()
        sizes = Concat<axis = 0>(sh, hw)
        u = Resize<mode = "nearest">(r, , , sizes)
        y = Conv(u, V)""",
        {"W": (6, 3, 1, 1), "V": (3, 6, 1, 1)},
        [6],
    ),
    "Resize to sizes that name the channels": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        r = Relu(h)
        n = Shape<end = 1>(x)
        rest = Constant<value = int64[3] {6, 8, 8}>()
        sizes = Concat<axis = 0>(n, rest)
        u = Resize<mode = "nearest">(r, , , sizes)
        y = Conv(u, V)""",
        {"W": (6, 3, 1, 1), "V": (3, 6, 1, 1)},
        [6],
    ),
    "pixel shuffle, CRD": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        d = DepthToSpace<blocksize = 2, mode = "CRD">(h)
        r = Relu(d)
        y = Conv(r, V)""",
        {"W": (20, 3, 1, 1), "V": (3, 5, 1, 1)},
        [5],
    ),
    "pixel shuffle, DCR": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        d = DepthToSpace<blocksize = 2>(h)
        r = Relu(d)
        y = Conv(r, V)""",
        {"W": (20, 3, 1, 1), "V": (3, 5, 1, 1)},
        [5],
    ),
    "space to depth": (
        "float[N, 3, 4, 4] x",
        """h = Conv(x, W)
        d = SpaceToDepth<blocksize = 2>(h)
        r = Relu(d)
        y = Conv(r, V)""",
        {"W": (5, 3, 1, 1), "V": (3, 20, 1, 1)},
        [5],
    ),
    "a sum over time": (
        "float[N, 4, 5] x",
        """h = MatMul(x, W)
        axis = Constant<value = int64 {1}>()
        s = CumSum(h, axis)
        t = Tanh(s)
        y = MatMul(t, V)""",
        {"W": (5, 6), "V": (6, 3)},
        [6],
    ),
}
each_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def build(network, rng, header=HEADER):
    """A model of random values; variances are positive."""
    signature, body, shapes, _ = network
    lines = [line.strip() for line in body.splitlines()]
    text = f"{header}net ({signature}) => (float[] y) {{ {chr(10).join(lines)} }}"
    model = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) if name != "v" else rng.random(shape) + 0.5
        if shape == ():
            values = np.float32(1.4)
        array = np.asarray(values, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    declare_output(model, rng)
    onnx.checker.check_model(model, full_check=True)
    return load(model)


def declare_output(model, rng):
    """Give the output the shape that it has, with a free number of samples."""
    output = model.graph.output[0]
    output.type.tensor_type.ClearField("shape")
    _, *rest = run(model, inputs(Model(model, None, None), rng)).shape
    output.CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", *rest]))


def inputs(model, rng, samples=4):
    """Samples for the one input of a model."""
    shape = [d.dim_value or samples for d in model.proto.graph.input[0].type.tensor_type.shape.dim]
    return {"x": rng.standard_normal(shape).astype(np.float32)}


def structure_of(model, feeds, **choices):
    layers = find_layers(model.proto).layers
    return find_structure(model.proto, layers, shapes_of_a_run(model, feeds), **choices)


def run(proto, feeds):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def names_of(model):
    return {layer.name for layer in find_layers(model.proto).layers}


def some_units(structure, rng):
    """About half of the units, one at least in every group."""
    keep = rng.random(structure.units) > 0.5
    for group in structure.groups:
        keep[rng.choice(group.units)] = True
    return keep


def without_outgoing_weights(model, structure, keep):
    """The model with zeros wherever units that do not stay are read, or meet in a product."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    stored = {t.name: t for t in proto.graph.initializer}
    for layer in find_layers(model.proto).layers:
        tensor = stored[layer.weight.tensor]
        matrix = layer.weight.matrix(onnx.numpy_helper.to_array(tensor)).copy()
        matrix[:, ~structure.columns_kept(layer.name, keep)] = 0
        matrix[~structure.rows_read(layer.name, keep)] = 0
        values = np.ascontiguousarray(layer.weight.unmatrix(matrix))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        zero = structure.silent[layer.name] & ~structure.rows_kept(layer.name, keep)
        if zero.any():
            layer.store(proto, None, np.where(zero, -layer.bias_values(proto), 0))
    return Model(proto, None, None)


@each_network
def test_the_units_of_every_group_are_found(network, rng):
    model = build(network, rng)
    structure = structure_of(model, inputs(model, rng))
    assert [len(group.units) for group in structure.groups] == network[3]
    assert [x.name for x in structure.refusals] != []  # the last layer makes the output


@each_network
def test_removing_units_that_nobody_reads_changes_nothing(network, rng):
    model = build(network, rng)
    feeds = inputs(model, rng)
    structure = structure_of(model, feeds)
    keep = some_units(structure, rng)
    masked = without_outgoing_weights(model, structure, keep)
    smaller = cut(masked.proto, structure, keep)
    onnx.checker.check_model(smaller, full_check=True)
    assert smaller.graph.input == model.proto.graph.input
    assert smaller.graph.output == model.proto.graph.output
    wanted, scale = run(masked.proto, feeds), np.abs(run(masked.proto, feeds)).max()
    np.testing.assert_allclose(run(smaller, feeds), wanted, rtol=0, atol=1e-5 * scale)


@each_network
def test_the_smaller_model_holds_nothing_of_the_units_that_went(network, rng):
    model = build(network, rng)
    structure = structure_of(model, inputs(model, rng))
    keep = some_units(structure, rng)
    smaller = cut(model.proto, structure, keep)
    before = {layer.name: layer for layer in find_layers(model.proto).layers}
    for layer in find_layers(smaller).layers:
        rows = structure.rows_kept(layer.name, keep).sum()
        columns = structure.columns_kept(layer.name, keep).sum()
        assert layer.shape == (rows, columns)
        assert before.pop(layer.name).op == layer.op
    assert not before
    read = {x for node in smaller.graph.node for x in node.input}
    assert all(t.name in read for t in smaller.graph.initializer)


@each_network
def test_keeping_all_units_is_the_identity(network, rng):
    model = build(network, rng)
    structure = structure_of(model, inputs(model, rng))
    assert cut(model.proto, structure, np.ones(structure.units, bool)) == model.proto


@each_network
def test_the_reference_implementation_agrees(network, rng):
    if any(node.domain for node in build(network, rng).proto.graph.node):
        pytest.skip("onnx.reference has no operators of com.microsoft")
    model = build(network, rng)
    feeds = inputs(model, rng)
    structure = structure_of(model, feeds)
    smaller = cut(model.proto, structure, some_units(structure, rng))
    (wanted,) = ReferenceEvaluator(smaller).run(None, feeds)
    np.testing.assert_allclose(
        run(smaller, feeds), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude"])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.4, 0.5])
def test_zeros_that_are_there_already_count_towards_the_target(share, method, rng):
    model = build(NETWORKS["Gemm chain"], rng)
    for weight in model.proto.graph.initializer:
        values = onnx.numpy_helper.to_array(weight).copy()
        if values.ndim == 2:
            values.flat[::4] = 0
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    report = onnx_ecp.optimize(
        model.proto, inputs(model, rng, 60), method=method, granularity="unit", sparsity=share
    ).report
    dense = report.weights
    assert report.sparsity >= share
    # No more goes than one unit, the largest of which has ten weights.
    assert report.zeros_after <= max(share * dense + 10, report.zeros_before)
    gone = any(row.after < row.before for row in report.units)
    assert gone == (report.zeros_before < share * dense)


@pytest.mark.slow
@each_network
@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude"])
def test_optimize_reaches_the_share_of_weights_and_what_it_writes_checks(
    network, method, rng, tmp_path
):
    model = build(network, rng)
    output = tmp_path / "out.onnx"
    data = inputs(model, rng, 60)
    result = onnx_ecp.optimize(
        model.proto, data, output=output, method=method, granularity="unit", sparsity=0.2, stages=2
    )
    report = result.report
    onnx.checker.check_model(str(output), full_check=True)
    assert report.sparsity >= 0.2
    assert report.zeros_after == report.work_before.weights - report.work_after.weights
    assert report.work_after.weights == sum(
        layer.shape[0] * layer.shape[1] for layer in find_layers(onnx.load(output)).layers
    )


@pytest.mark.parametrize("method", ["obs", "ecp"])
@pytest.mark.parametrize("name", ["Gemm chain", "attention: heads"])
def test_the_result_does_not_depend_on_the_memory(name, method, rng):
    """With one byte every layer has its own pass over the data, and sums lie in temporary files."""
    model = build(NETWORKS[name], rng)
    choices = {"granularity": "unit", "sparsity": 0.3, "stages": 2, "method": method}
    data = inputs(model, rng, 40)
    little, much = (
        onnx_ecp.optimize(model.proto, data, max_memory=memory, **choices) for memory in (1, "1G")
    )
    assert little.model == much.model


def on_reference(path, feeds):
    if any(node.domain for node in onnx.load(path).graph.node):
        pytest.skip("onnx.reference has no operators of com.microsoft")
    of_groups = [n for n in onnx.load(path).graph.node if n.op_type == "ConvTranspose"]
    if any(a.name == "group" for n in of_groups if len(n.input) > 2 for a in n.attribute):
        pytest.skip("onnx.reference adds the bias of a grouped ConvTranspose in another way")
    return ReferenceEvaluator(path).run(None, feeds)[0]


def on_openvino(path, feeds):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)[0]


@pytest.mark.slow
@pytest.mark.parametrize("compute", [on_reference, on_openvino])
@each_network
def test_every_runtime_agrees_on_what_optimize_writes(network, compute, rng, tmp_path):
    model = build(network, rng)
    path = str(tmp_path / "out.onnx")
    data = inputs(model, rng, 60)
    made = onnx_ecp.optimize(
        model.proto, data, output=path, granularity="unit", sparsity=0.2, stages=2
    )
    assert made.report.work_after.weights < made.report.work_before.weights
    written = onnx.load(path)
    onnx.checker.check_model(path, full_check=True)
    assert written.graph.input == model.proto.graph.input
    assert written.graph.output == model.proto.graph.output
    wanted = run(written, data)
    np.testing.assert_allclose(
        compute(path, data), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()
    )


REFUSED = {
    "a model output": ("h = MatMul(x, W)\n y = MatMul(h, V)\n", "y", "the model's output 'y'"),
    "a hidden model output": ("y = MatMul(x, W)\n z = MatMul(y, V)\n", "W", "model's output 'y'"),
    "normalised": (
        "h = MatMul(x, W)\n n = LayerNormalization(h, g)\n y = MatMul(n, V)\n",
        "h",
        "LayerNormalization 'n': it normalises over units",
    ),
    "summed": (
        "h = MatMul(x, W)\n m = ReduceMean<axes = [1]>(h)\n d = Sub(h, m)\n y = MatMul(d, V)\n",
        "h",
        "ReduceMean 'm': it reduces over units",
    ),
    "an operator without a rule": (
        "h = MatMul(x, W)\n c = LpNormalization(h)\n y = MatMul(c, V)\n",
        "h",
        "LpNormalization 'c': units are not followed through this operator",
    ),
    "a sum over units": (
        "h = MatMul(x, W)\n c = CumSum(h, one)\n y = MatMul(c, V)\n",
        "h",
        "CumSum 'c': it sums over units",
    ),
    "units taken in steps": (
        """h = MatMul(x, W)
        z = Constant<value = int64[1] {0}>()
        e = Constant<value = int64[1] {6}>()
        a = Constant<value = int64[1] {1}>()
        t = Constant<value = int64[1] {2}>()
        c = Slice(h, z, e, a, t)
        y = Tanh(c)""",
        "h",
        "Slice 'c': it takes units in steps",
    ),
    "a number of units that enters the arithmetic": (
        """h = MatMul(x, W)
        s = Shape(h)
        n = Gather(s, one)
        f = Cast<to = 1>(n)
        d = Div(h, f)
        y = MatMul(d, V)""",
        "h",
        "Cast 'f': it computes with the number of units",
    ),
    "joined with an input": (
        "h = MatMul(x, W)\n s = Add(h, e)\n y = MatMul(s, V)\n",
        "h",
        "Add 's': its input 'e' is not a stored tensor",
    ),
}


@pytest.mark.parametrize(("body", "name", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_unit_that_cannot_be_followed_stays_and_the_operator_is_named(body, name, reason, rng):
    hidden = "MatMul(y, V)" in body
    outputs = "float[N, K] y, float[N, L] z" if hidden else "float[N, K] y"
    text = f"""{HEADER}net (float[N, 5] x, float[N, 6] e) => ({outputs})
    <float[5, 6] W, float[6, 4] V, float[6] g, int64 one = {{1}}> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name_, shape in {"W": (5, 6), "V": (6, 4), "g": (6,)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        stored = next((t for t in proto.graph.initializer if t.name == name_), None)
        stored = stored if stored is not None else proto.graph.initializer.add()
        stored.CopyFrom(onnx.numpy_helper.from_array(values, name_))
    structure = find_structure(proto, find_layers(proto).layers, inferred_shapes(proto))
    reasons = [x.reason for x in structure.refusals]
    assert any(reason in text for text in reasons), reasons
    if name == "h":
        assert structure.units == 0


ENDS = {
    "normalised": ("e = LayerNormalization(k, g)", "LayerNormalization 'e': it normalises"),
    "without a rule": ("e = LpNormalization(k)", "LpNormalization 'e': units are not followed"),
    "reduced": (
        "m = ReduceMean<axes = [1]>(k)\n e = Sub(k, m)",
        "ReduceMean 'm': it reduces over units (tensor 'k')",
    ),
}
BEHIND = {
    "added": "s = Add(h, e)",
    "multiplied, behind others": "r = Relu(e)\n t = Sigmoid(r)\n s = Mul(t, h)",
    "concatenated with its sum": "c = Neg(e)\n d = Add(c, h)\n s = Concat<axis = 1>(d, h)",
    "behind a Reshape": "i = Constant<value_ints = [-1, 6]>()\n r = Reshape(e, i)\n s = Sub(h, r)",
}


@pytest.mark.parametrize(("end", "root"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_a_refusal_names_where_the_way_ends_and_not_what_stands_behind(end, root, behind, rng):
    """Whatever meets units that are not followed further: the reason is that of the root."""
    width = 12 if "Concat" in behind else 6
    body = f"""h = MatMul(x, W)
        k = MatMul(x, K)
        {end}
        {behind}
        y = MatMul(s, V)"""
    shapes = {"W": (5, 6), "K": (5, 6), "V": (width, 4)} | ({"g": (6,)} if "g)" in end else {})
    model = build(("float[N, 5] x", body, shapes, []), rng)
    structure = structure_of(model, inputs(model, rng))
    reasons = {x.name: x.reason for x in structure.refusals}
    assert reasons["k"].startswith(f"its units stay: {root}")
    assert reasons["h"].startswith(f"its units stay: {root}")


@pytest.mark.parametrize(("opset", "units"), [(11, []), (13, [4])])
def test_before_opset_13_a_softmax_takes_all_axes_from_the_first_on(opset, units, rng):
    _, body, shapes, _ = NETWORKS["attention: heads"]
    body = body.replace("Softmax<axis = -1>(d)", "Softmax(d)")
    version, other = '"": 17', f'"": {opset}'
    model = build(("float[N, 3, 5] x", body, shapes, []), rng, HEADER.replace(version, other))
    structure = structure_of(model, inputs(model, rng), inside=False)
    assert [len(group.units) for group in structure.groups] == units


# Name: (what stands for keys, for logits, and for what follows them, the reason).
HELD = {
    "keys turned by their position": (
        "Mul(kt, table)",
        "MatMul(qt, r)",
        "Softmax(l)",
        "MatMul 'l': its queries or keys are not just a layer with its bias",
    ),
    "a number for every position": (
        "Add(kt, place)",
        "MatMul(qt, r)",
        "Softmax(l)",
        "MatMul 'l': its queries or keys are not just a layer with its bias",
    ),
    "no softmax": (
        "Identity(kt)",
        "MatMul(qt, r)",
        "Relu(l)",
        "MatMul 'l': it sums over units, and no softmax over the last axis follows",
    ),
    "a softmax over queries": (
        "Identity(kt)",
        "MatMul(qt, r)",
        "Softmax<axis = 2>(l)",
        "MatMul 'l': it sums over units, and no softmax over the last axis follows",
    ),
    "a scale that is the size of heads": (
        "Identity(kt)",
        """MatMul(qt, r)
        s = Shape(qt)
        last = Constant<value = int64 {3}>()
        w = Gather(s, last)
        f = Cast<to = 1>(w)
        e = Div(l, f)""",
        "Softmax(e)",
        "MatMul 'l': it sums over units, and no softmax over the last axis follows",
    ),
}


@pytest.mark.parametrize(("keys", "logits", "behind", "reason"), HELD.values(), ids=HELD)
def test_heads_keep_their_width_where_a_dimension_does_more_than_meet(
    keys, logits, behind, reason, rng
):
    body = NETWORKS["attention: heads"][1]
    body = body.replace("l = MatMul(qt, kt)\n        d = Div(l, root)", f"r = {keys}\nl = {logits}")
    body = body.replace("Softmax<axis = -1>(d)", behind)
    shapes = {"Q": (5, 8), "K": (5, 8), "V": (5, 8), "O": (8, 5)}
    stored = {"Mul(kt, table)": {"table": (2, 3)}, "Add(kt, place)": {"place": (1, 3)}}
    model = build(("float[N, 3, 5] x", body, shapes | stored.get(keys, {}), []), rng)
    structure = structure_of(model, inputs(model, rng))
    held = [x for x in structure.refusals if x.name in ("q", "k")]
    assert [x.name for x in held] == ["q", "k"]
    assert all(x.reason.startswith(f"its heads keep their width: {reason} (") for x in held)
    assert [len(group.units) for group in structure.groups] == [4, 2]


def low_rank(rng, rows, columns):
    """(rows, columns) of four heads of two dimensions each, of which one is enough."""
    return np.concatenate(
        [rng.standard_normal((rows, 1)) @ rng.standard_normal((1, 2)) for _ in range(4)], axis=1
    )


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude"])
def test_directions_that_heads_do_not_use_leave_without_a_trace(method, rng):
    """In the basis given, every dimension is used; half of the directions are not."""
    model = build(NETWORKS["attention: heads"], rng)
    for tensor in model.proto.graph.initializer:
        if tensor.name in "QKV":
            values = low_rank(rng, 5, 8).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    data = inputs(model, rng, 200)
    made = onnx_ecp.optimize(
        model.proto, data, granularity="unit", sparsity=0.45, method=method, stages=2
    )
    after = {row.producers: (row.before, row.after) for row in made.report.units}
    assert after == {("q", "k", "v"): (4, 4), ("q", "k"): (2, 1), ("v",): (2, 1)}
    wanted = run(model.proto, data)
    np.testing.assert_allclose(
        run(made.model, data), wanted, rtol=0, atol=1e-2 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude"])
def test_directions_that_heads_in_one_tensor_do_not_use_leave_without_a_trace(method, rng):
    """Queries and keys have a basis of their own there, and so have values."""
    model = build(NETWORKS["queries, keys and values in one tensor, unbound"], rng)
    parts = [rng.standard_normal((6, 1)) @ rng.standard_normal((1, 2)) for _ in range(9)]
    for tensor in model.proto.graph.initializer:
        if tensor.name == "W":
            values = np.concatenate(parts, axis=1).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    data = inputs(model, rng, 200)
    made = onnx_ecp.optimize(
        model.proto, data, granularity="unit", sparsity=0.45, method=method, stages=2
    )
    assert [(row.before, row.after) for row in made.report.units] == [(3, 3), (2, 1)]
    wanted = run(model.proto, data)
    np.testing.assert_allclose(
        run(made.model, data), wanted, rtol=0, atol=1e-2 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("method", ["ecp-refit", "ecp"])
def test_the_importance_of_heads_that_went_is_reported(method, rng, tmp_path):
    """Beside that of their dimensions, whose layers are the same."""
    model = build(NETWORKS["attention: heads"], rng)
    made = onnx_ecp.optimize(
        model.proto,
        inputs(model, rng, 100),
        granularity="unit",
        sparsity=0.25,
        method=method,
        stages=1,
        unit_multiple=2,
        masks=tmp_path / "masks.npz",
    )
    gone = {row.producers: row.before - row.after for row in made.report.units}
    assert gone["q", "k", "v"] > 0
    removed = {layer.name: layer.importance_removed for layer in made.report.layers}
    assert removed["q"] > 0


def test_masks_are_of_heads_in_the_bases_given(rng, tmp_path):
    """Dimensions that no head uses go, and masks say which: no other basis knows their numbers."""
    model = build(NETWORKS["attention: heads"], rng)
    for tensor in model.proto.graph.initializer:
        if tensor.name in "QKV":
            values = rng.standard_normal((5, 8)).astype(np.float32)
            values[:, ::2] *= 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    made = onnx_ecp.optimize(
        model.proto,
        inputs(model, rng, 200),
        granularity="unit",
        sparsity=0.45,
        stages=2,
        masks=tmp_path / "masks.npz",
    )
    with np.load(tmp_path / "masks.npz") as masks:
        for name in "QKV":
            np.testing.assert_array_equal(masks[name], np.tile([False, True], 4)[None].repeat(5, 0))
            np.testing.assert_array_equal(masks[name], made.masks[name])


def test_fine_tuning_goes_on_without_the_units_that_went(rng):
    model = build(NETWORKS["attention: one merged layer, biases, masked"], rng)
    data = inputs(model, rng, 200)
    choices = {"granularity": "unit", "sparsity": 0.3, "method": "magnitude"}
    plain, tuned = (
        onnx_ecp.optimize(model.proto, data, finetune_steps=steps, **choices).report
        for steps in (0, 100)
    )
    assert [row.after for row in tuned.units] == [row.after for row in plain.units]
    assert tuned.gap.relative_error < 0.9 * plain.gap.relative_error


def test_who_reads_pooling_indices_is_the_reason_why_channels_stay(rng):
    body = """h = Conv(x, W)
        p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)
        c = Cast<to = 1>(i)
        u = Mul(p, c)
        y = Conv(u, V)"""
    shapes = {"W": (6, 2, 1, 1), "V": (3, 6, 1, 1)}
    model = build(("float[N, 2, 4, 4] x", body, shapes, []), rng)
    structure = structure_of(model, inputs(model, rng))
    assert structure.units == 0
    reasons = {row.name: row.reason for row in structure.refusals}
    assert "MaxPool 'p': its indices, read by Cast 'c', count all channels" in reasons["h"]


def everything_inferred(proto):
    """Whether shape inference tells all shapes."""
    known = inferred_shapes(proto)
    return all(y in known for node in proto.graph.node for y in node.output)


@each_network
def test_shape_inference_finds_what_a_run_finds(network, rng):
    model = build(network, rng)
    if not everything_inferred(model.proto):
        pytest.skip("onnx infers no shapes of com.microsoft, nor behind a Div of sizes")
    layers = find_layers(model.proto).layers
    inferred = find_structure(model.proto, layers, inferred_shapes(model.proto))
    measured = structure_of(model, inputs(model, rng))
    assert [g.producers for g in inferred.groups] == [g.producers for g in measured.groups]


@each_network
def test_clean_up_deletes_dead_units_and_changes_no_output(network, rng):
    model = build(network, rng)
    feeds = inputs(model, rng)
    structure = structure_of(model, feeds, inside=False)
    keep = some_units(structure, rng)
    masked = without_outgoing_weights(model, structure, keep)
    done = clean_up(masked, names_of(masked), [feeds])
    assert not done.refused
    assert sum(row.before - row.after for row in done.rows) == (~keep).sum()
    onnx.checker.check_model(done.model.proto, full_check=True)
    wanted = run(masked.proto, feeds)
    np.testing.assert_allclose(
        run(done.model.proto, feeds), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


CONSTANT = ["Gemm chain", "MatMul, scale and bias broadcast, on tokens", "weight on the left"]


@pytest.mark.parametrize("name", [*CONSTANT, "Conv, BatchNormalization, pools, Flatten"])
def test_clean_up_folds_constant_units_into_the_next_bias(name, rng):
    model = build(NETWORKS[name], rng)
    feeds = inputs(model, rng)
    weight = next(t for t in model.proto.graph.initializer if t.name == "W")
    values = onnx.numpy_helper.to_array(weight).copy()
    layer = find_layers(model.proto).layers[0]
    matrix = layer.weight.matrix(values)
    matrix[[1, 4]] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(layer.weight.unmatrix(matrix), "W"))
    done = clean_up(model, names_of(model), [feeds])
    assert [(row.before, row.after) for row in done.rows] == [(6, 4)]
    wanted = run(model.proto, feeds)
    np.testing.assert_allclose(
        run(done.model.proto, feeds), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


# Name: (signature, body, shapes, sizes of a sample and of something else that may be given).
# Units without incoming weights are one number on the samples; elsewhere they are not.
ONE_NUMBER_ON_SAMPLES = {
    "added up over any number of tokens": (
        "float[N, T, 5] x",
        """h = MatMul(x, W)
        a = Add(h, b)
        s = ReduceSum<keepdims = 0>(a, axes)
        y = Gemm(s, V)""",
        {"W": (5, 6), "b": (6,), "V": (6, 4)},
        ((3, 5), (7, 5)),
    ),
    "times a mask that is all ones": (
        "float[N, T, 5] x",
        """h = MatMul(x, W)
        a = Add(h, b)
        m = Slice(x, zero, axes, two)
        k = Mul(a, m)
        y = MatMul(k, V)""",
        {"W": (5, 6), "b": (6,), "V": (6, 4)},
        ((3, 5), (3, 5)),
    ),
    "between the cells of a transposed convolution": (
        "float[N, 2, H, H] x",
        """h = Conv(x, W, b)
        k = ConvTranspose<strides = [2, 2]>(h, V)
        y = GlobalMaxPool(k)""",
        {"W": (6, 2, 1, 1), "b": (6,), "V": (6, 4, 2, 2)},
        ((2, 6, 6), (2, 7, 7)),
    ),
    "a border that only odd sizes reach": (
        "float[N, 2, H, H] x",
        """h = Conv(x, W, b)
        k = Conv<pads = [0, 0, 1, 1], strides = [2, 2]>(h, V)
        y = GlobalMaxPool(k)""",
        {"W": (6, 2, 1, 1), "b": (6,), "V": (4, 6, 2, 2)},
        ((2, 6, 6), (2, 7, 7)),
    ),
}


@pytest.mark.parametrize("network", ONE_NUMBER_ON_SAMPLES.values(), ids=ONE_NUMBER_ON_SAMPLES)
def test_what_is_one_number_on_the_samples_alone_is_not_folded(network, rng):
    signature, body, shapes, sizes = network
    text = f"""{HEADER}net ({signature}) => (float[] y)
    <int64[1] axes = {{1}}, int64[1] zero = {{0}}, int64[1] two = {{2}}> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "W":
            values[(slice(None), slice(3)) if shape == (5, 6) else slice(3)] = 0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = Model(proto, None, None)
    samples, others = (rng.standard_normal((4, *size)).astype(np.float32) for size in sizes)
    samples[..., 0] = 1
    done = clean_up(model, names_of(model), [{"x": samples}])
    wanted = run(proto, {"x": others})
    found = run(done.model.proto, {"x": others})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["SwiGLU: two producers", "Split of one producer"])
def test_a_product_with_what_is_zero_is_cleaned_up(name, rng):
    """Gates of which no weight is left, and no bias, shut whatever passes them."""
    _, body, shapes, _ = NETWORKS[name]
    body = body.replace("s = Sigmoid(p)", "s = Relu(p)")
    model = build((NETWORKS[name][0], body, shapes, []), rng)
    for tensor in model.proto.graph.initializer:
        if tensor.name in ("G" if name.startswith("SwiGLU") else "Wb"):
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[..., :3] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    feeds = inputs(model, rng)
    done = clean_up(model, names_of(model), [feeds])
    assert [row.before - row.after for row in done.rows] == [3]
    wanted = run(model.proto, feeds)
    np.testing.assert_allclose(
        run(done.model.proto, feeds), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


@pytest.mark.parametrize(
    ("body", "worst"),
    [
        ("y = Identity(x)", 0),
        ("d = Sub(x, x)\n y = Div(d, d)", np.inf),  # NaN
        ("d = Sub(x, x)\n y = Div(x, d)", np.inf),  # infinite
        ("y = Mul(x, half)", 0.5),
    ],
)
def test_no_difference_hides_behind_what_is_not_finite(body, worst):
    signature = "float[N, 3] x) => (float[N, 3] y) <float half = {0.5}>"
    first, second = (
        Model(onnx.parser.parse_model(f"{HEADER}net ({signature} {{ {b} }}"), None, None)
        for b in ("y = Identity(x)", body)
    )
    feeds = {"x": np.array([[1, -2, 4]], np.float32)}
    assert largest_difference(first, second, [feeds]) == worst
    broken = {"x": np.array([[1, np.nan, np.inf]], np.float32)}
    assert largest_difference(first, first, [broken]) == 0


def test_integers_are_compared_one_by_one():
    text = "net (float[N, 4] x) => (int64[N, 1] y) {{ s = {}(x)\n y = ArgMax<axis = 1>(s) }}"
    first, second = (
        Model(onnx.parser.parse_model(HEADER + text.format(op)), None, None)
        for op in ("Identity", "Abs")
    )
    feeds = {"x": np.array([[1, 2, 3, -4], [1, 2, 3, 4]], np.float32)}
    assert largest_difference(first, second, [feeds]) == 0.5


def refused_by_the_runtime(proto, structure, keep, base=None):
    smaller = cut(proto, structure, keep, base)
    turned = onnx.helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 1, 2])
    smaller.graph.node.insert(0, turned)
    return smaller


def test_clean_up_that_gives_no_model_is_not_the_end_of_a_run(rng, monkeypatch):
    monkeypatch.setattr(cleanup, "cut", refused_by_the_runtime)
    model = build(NETWORKS["Gemm chain"], rng)
    data = inputs(model, rng, 80)
    choices = {"method": "magnitude", "sparsity": 0.9}
    result = onnx_ecp.optimize(model.proto, data, **choices)
    whole = onnx_ecp.optimize(model.proto, data, cleanup=False, **choices)
    assert result.model == whole.model
    assert any("nothing was cleaned up: the smaller" in text for text in result.report.warnings)


@pytest.mark.parametrize("name", CONSTANT)
def test_clean_up_rounds_as_the_weights_do(name, rng):
    """One unit in the last place of float16 is more than rounding of float32 explains."""
    model = build(NETWORKS[name], rng)
    matrix = next(t for t in model.proto.graph.initializer if t.name == "W")
    values = onnx.numpy_helper.to_array(matrix).copy()
    layer = find_layers(model.proto).layers[0]
    rows = layer.weight.matrix(values)
    rows[[1, 4]] = 0
    matrix.CopyFrom(onnx.numpy_helper.from_array(layer.weight.unmatrix(rows), "W"))
    half = onnx.ModelProto()
    half.CopyFrom(model.proto)
    for tensor in half.graph.initializer:
        stored = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(stored, tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    feeds = [{"x": inputs(model, rng, 64)["x"].astype(np.float16)}]
    done = clean_up(Model(half, None, None), names_of(model), feeds)
    assert not done.refused
    assert [(row.before, row.after) for row in done.rows] == [(6, 4)]


def damaged(op_type):
    """A cut that puts another operator behind the layer h where it loses units."""

    def cutting(proto, structure, keep, base=None):
        made = cut(proto, structure, keep, base)
        if any(group.name == "h" and not keep[group.units].all() for group in structure.groups):
            next(node for node in made.graph.node if node.op_type == "Relu").op_type = op_type
        return made

    return cutting


@pytest.mark.parametrize(
    ("op_type", "reason"),
    [("Det", "ONNX Runtime does not run the model"), ("Neg", "outputs differ by")],
)
def test_units_without_which_a_model_goes_wrong_stay_and_the_others_go(
    op_type, reason, rng, monkeypatch
):
    monkeypatch.setattr(smaller, "cut", damaged(op_type))
    model = build(NETWORKS["Gemm chain"], rng)
    data = inputs(model, rng, 60)
    choices = {"granularity": "unit", "sparsity": 0.4, "method": "magnitude"}
    made = onnx_ecp.optimize(model.proto, data, **choices)
    rows = {row.producers[0]: row for row in made.report.units}
    assert rows["k"].after < rows["k"].before
    assert "h" not in rows or rows["h"].after == rows["h"].before
    told = [*made.report.warnings, *(skip.reason for skip in made.report.skips)]
    assert any(reason in text for text in told)
    assert made.report.gap.outputs[0].raw_error < 1


SPLIT = (
    "float[N, 2, 6, 6] x",
    """h = Conv(x, W, b)
    p, q = Split<axis = 1>(h)
    m = MaxPool<kernel_shape = [2, 2]>(p)
    n = AveragePool<kernel_shape = [2, 2]>(q)
    c = Concat<axis = 1>(m, n)
    a = Relu(c)
    k = Conv(a, V)
    r = Relu(k)
    g = GlobalAveragePool(r)
    f = Flatten(g)
    y = MatMul(f, U)""",
    {"W": (8, 2, 3, 3), "b": (8,), "V": (6, 8, 3, 3), "U": (6, 4)},
    [8, 6],
)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_something_stays_of_every_part_of_a_tensor(granularity, rng, monkeypatch):
    """All channels of the one part are worth nothing; without any, no operator would run."""
    monkeypatch.setattr("onnx_ecp.units.cleanup.BLOCKS", ())  # its eight channels are a block
    model = build(SPLIT, rng)
    weight = next(t for t in model.proto.graph.initializer if t.name == "V")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, :4] *= 1e-6
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "V"))
    choices = {"granularity": granularity, "method": "magnitude"}
    result = onnx_ecp.optimize(model.proto, inputs(model, rng, 40), sparsity=0.6, **choices)
    row = next(row for row in result.report.units if row.producers == ("h",))
    assert row.after >= 2
    assert not any("clean" in text for text in result.report.warnings)


def test_a_constant_that_a_border_hides_stays(rng):
    network = (
        "float[N, 2, 6, 6] x",
        """h = Conv(x, W, b)
        k = Conv<pads = [1, 1, 1, 1]>(h, V)
        y = GlobalAveragePool(k)""",
        {"W": (6, 2, 3, 3), "b": (6,), "V": (4, 6, 3, 3)},
        [6],
    )
    model = build(network, rng)
    weight = next(t for t in model.proto.graph.initializer if t.name == "W")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[2] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "W"))
    assert clean_up(model, names_of(model), [inputs(model, rng)]).rows == ()


@pytest.mark.parametrize(
    ("outputs", "unread", "gathered"),
    [(4, "faster", False), (200, "faster", True), (4, "smaller", False), (10, "smaller", True)],
)
def test_inputs_that_nobody_reads_are_gathered_away_where_that_pays(outputs, unread, gathered, rng):
    shapes = {"W": (outputs, 16), "b": (outputs,), "V": (outputs, 4), "c": (1, 4), "U": (4, 3)}
    _, body, _, _ = NETWORKS["Gemm chain"]
    model = build(("float[N, 16] x", body, shapes, [outputs, 4]), rng)
    weight = next(t for t in model.proto.graph.initializer if t.name == "W")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, 5:] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "W"))
    feeds = inputs(model, rng)
    done = clean_up(model, names_of(model), [feeds], unread)
    smaller = done.model.proto.ByteSize() < model.proto.ByteSize()
    assert smaller or not gathered
    found = [(row.producers, row.consumers, row.before, row.after, row.why) for row in done.rows]
    assert found == [(("x",), ("h",), 16, 5, "unread")] * gathered
    onnx.checker.check_model(done.model.proto, full_check=True)
    wanted = run(model.proto, feeds)
    np.testing.assert_allclose(
        run(done.model.proto, feeds), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


@each_network
def test_inspect_shows_the_groups(network, rng):
    model = build(network, rng)
    found = inspect(model.proto, inputs(model, rng))
    assert [group.units for group in found.unit_groups] == network[3]
    assert found.unit_refusals


def test_units_that_differ_in_size_come_as_close_to_the_target_as_they_can(rng):
    model = build(NETWORKS["Conv, BatchNormalization, pools, Flatten"], rng)
    feeds = inputs(model, rng)
    structure = structure_of(model, feeds)
    layers = find_layers(model.proto).layers
    costs = budget(structure, layers, "params", {layer.name: 1 for layer in layers})
    whole = np.ones(structure.units, bool)
    for share in (0.9, 0.7, 0.5):
        target, scores = share * costs.total(whole), rng.random(structure.units)
        keep = choose(
            scores, whole, structure.groups, costs, lambda x, most=target: costs.total(x) <= most
        )
        assert costs.total(keep) <= target
        for unit in np.flatnonzero(~keep):
            group = next(g for g in structure.groups if unit in g.units)
            gone = group.units[~keep[group.units]]
            rest = keep.copy()
            rest[gone[np.argmax((scores / costs.of_units(whole))[gone])]] = True
            assert costs.total(rest) > target


# Name: the numbers of units of every group that may stay, in multiples of four.
MULTIPLES = {
    "Split of one producer": [[4]],  # merged, two rows per unit: one column
    "Conv, BatchNormalization, pools, Flatten": [[4], [4]],
    "attention: heads": [[2, 4], [], []],  # of two rows each; dimensions of heads on their own
    "attention: one merged layer, biases, masked": [[1, 2], [4], [4]],
}


@pytest.mark.parametrize(("name", "numbers"), MULTIPLES.items())
def test_layers_keep_multiples_of_rows_and_columns(name, numbers, rng):
    model = build(NETWORKS[name], rng)
    groups = structure_of(model, inputs(model, rng)).groups
    assert [multiples(group, 4).tolist() for group in groups] == numbers


def test_units_stay_in_multiples_where_they_go(rng):
    model = build(NETWORKS["residual addition"], rng)
    result = onnx_ecp.optimize(
        model.proto, inputs(model, rng, 40), granularity="unit", sparsity=0.3, unit_multiple=2
    )
    after = [row.after for row in result.report.units]
    before = [row.before for row in result.report.units]
    assert all(a % 2 == 0 or a == b for a, b in zip(after, before, strict=True))
    assert after != before


def test_a_speedup_is_one_of_multiplications(rng):
    model = build(NETWORKS["Conv, BatchNormalization, pools, Flatten"], rng)
    data = inputs(model, rng, 40)
    report = onnx_ecp.optimize(
        model.proto, data, granularity="unit", speedup=1.5, cost="flops"
    ).report
    assert report.work_after.flops <= report.work_before.flops / 1.5


def test_a_speedup_leaves_sizes_that_kernels_like_unless_told_otherwise(rng):
    """Multiples of eight channels, or 1, 2 and 4; what needs fewer steps of another group goes."""
    body = """h = Conv(x, W)
        a = Relu(h)
        k = Conv(a, V)
        r = Relu(k)
        g = GlobalAveragePool(r)
        f = Flatten(g)
        y = Gemm(f, U)"""
    shapes = {"W": (20, 2, 1, 1), "V": (36, 20, 1, 1), "U": (36, 3)}
    model = build(("float[N, 2, 4, 4] x", body, shapes, []), rng)
    choices = {"speedup": 1.7, "method": "ecp", "stages": 2}
    made = onnx_ecp.optimize(model.proto, inputs(model, rng, 60), **choices)
    assert made.report.work_after.flops <= made.report.work_before.flops / 1.7
    for row in made.report.units:
        assert row.after in (1, 2, 4, row.before) or row.after % 8 == 0
    assert sum(row.before - row.after for row in made.report.units) > 0
    single = onnx_ecp.optimize(model.proto, inputs(model, rng, 60), unit_multiple=1, **choices)
    assert any(row.after % 8 and row.after > 4 for row in single.report.units)


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude"])
@pytest.mark.parametrize(
    "name", ["Conv, BatchNormalization, pools, Flatten", "ReduceSum beside a layer"]
)
def test_units_go_to_a_speed_and_zeros_in_what_stays_to_a_size(name, method, rng, tmp_path):
    model = build(NETWORKS[name], rng)
    data = inputs(model, rng, 60)
    made = onnx_ecp.optimize(
        model.proto,
        data,
        output=tmp_path / "out.onnx",
        speedup=1.4,
        sparsity=0.6,
        units_and_zeros=True,
        method=method,
        stages=2,
    )
    report, layers = made.report, find_layers(made.model).layers
    assert report.work_after.flops <= report.work_before.flops / 1.4
    assert any(row.after < row.before for row in report.units)
    whole = sum(np.prod(x.shape) for x in find_layers(model.proto).layers)
    assert sum(np.prod(x.shape) for x in layers) < whole
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in made.model.graph.initializer}
    left = sum(np.count_nonzero(stored[x.weight.tensor]) for x in layers)
    assert left <= 0.4 * whole + 0.5
    assert left < sum(np.prod(x.shape) for x in layers)
    assert report.sparsity == pytest.approx(1 - left / whole)
    assert not [text for text in report.warnings if "stayed in the file" in text]
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)


def test_zeros_are_not_needed_where_units_took_enough(rng):
    model = build(NETWORKS["Gemm chain"], rng)
    choices = {"speedup": 3.0, "sparsity": 0.1, "units_and_zeros": True, "method": "magnitude"}
    report = onnx_ecp.optimize(model.proto, inputs(model, rng, 40), **choices).report
    assert any("no zeros were needed" in text for text in report.warnings)
    assert report.sparsity > 0.1


@pytest.mark.parametrize(
    ("seconds", "promised"), [((1.0, 0.5), True), ((1.0, 1.0), False), ((1.0, 2.0), False)]
)
def test_what_is_not_faster_by_the_clock_is_not_called_so(seconds, promised, rng, monkeypatch):
    """Whatever the multiplications say."""
    model = build(NETWORKS["Gemm chain"], rng)
    a, b = seconds
    found = Latency(a, b, b / a, 1, 4, a, b, (0.99 * b / a, 1.01 * b / a))
    monkeypatch.setattr(gain, "brief_latency", lambda *args, **settings: found)
    choices = {"speedup": 2.0, "method": "magnitude", "stages": 1}
    report = onnx_ecp.optimize(model.proto, inputs(model, rng, 40), **choices).report
    assert "of the multiplications" in report.speed
    assert ("latency follows" in report.speed) == promised
    assert (f"the result is {found.verdict} here" in report.speed) != promised
    assert found.verdict in headline(report)


def test_a_large_block_is_spared_where_smaller_ones_cost_less(rng):
    """Four units that go together rank first, and save more than is needed; one other is enough."""
    model = build(NETWORKS["Gemm chain"], rng)
    structure = structure_of(model, inputs(model, rng))
    layers = find_layers(model.proto).layers
    costs = budget(structure, layers, "params", {layer.name: 1 for layer in layers})
    first, second = structure.groups
    scores, whole = np.full(structure.units, 9.0), np.ones(structure.units, bool)
    scores[first.units], scores[second.units[2]] = 1.0, 1.5
    stops = {6: np.array([2, 6]), 4: np.arange(1, 5)}
    keep = choose(
        scores,
        whole,
        structure.groups,
        costs,
        lambda rest: costs.total(rest) < costs.total(whole),
        stops=lambda group: stops[len(group.units)],
    )
    assert np.flatnonzero(~keep).tolist() == [second.units[2]]


def test_the_report_measures_latency_unless_told_otherwise(rng):
    model = build(NETWORKS["Gemm chain"], rng)
    data = inputs(model, rng, 40)
    choices = {"granularity": "unit", "sparsity": 0.2, "method": "magnitude", "threads": 1}
    for measure in (True, None, False):
        report = onnx_ecp.optimize(model.proto, data, measure=measure, **choices).report
        assert re.search(r"need 0\.\d+ of the multiplications", report.speed)
        assert (report.latency is None) == (measure is False)
        assert report.latency is None or report.latency.conditions.endswith(", 1 thread")


def test_an_excluded_layer_keeps_its_units_and_loses_inputs(rng):
    model = build(NETWORKS["Gemm chain"], rng)
    data = inputs(model, rng, 40)
    report = onnx_ecp.optimize(
        model.proto, data, granularity="unit", sparsity=0.2, exclude="^k$"
    ).report
    assert [row.producers for row in report.units] == [("h",)]
    assert any("matched by --exclude" in skip.reason for skip in report.skips)


def test_what_cannot_be_reached_is_an_error_with_the_most_that_can_be(rng):
    model = build(NETWORKS["Gemm chain"], rng)
    data = inputs(model, rng, 40)
    with pytest.raises(TargetError, match="is the most"):
        onnx_ecp.optimize(model.proto, data, granularity="unit", sparsity=0.999)


def test_a_model_without_units_is_an_error_with_reasons(rng):
    model = build(("float[N, 5] x", "y = MatMul(x, W)", {"W": (5, 3)}, []), rng)
    with pytest.raises(TargetError, match="the model's output 'y'"):
        onnx_ecp.optimize(model.proto, inputs(model, rng, 40), granularity="unit")


def test_layers_that_cannot_be_observed_have_their_reasons_too(rng):
    """What an If reads has no sensitivity; that is why its units stay, and it is said."""
    body = """h = MatMul(x, W)
        two = Constant<value_float = 2.0>()
        m = ReduceMax<keepdims = 0>(x)
        c = Less(m, two)
        t = If (c) <then_branch = g1 () => (float[N, 6] p) { p = Tanh(h) },
            else_branch = g2 () => (float[N, 6] q) { q = Relu(h) }>
        y = MatMul(t, V)"""
    model = build(("float[N, 5] x", body, {"W": (5, 6), "V": (6, 3)}, []), rng)
    with pytest.raises(TargetError, match=r"h .*they are read inside If"):
        onnx_ecp.optimize(model.proto, inputs(model, rng, 40), granularity="unit")


@pytest.mark.parametrize(
    "choices",
    [
        {"sparsity": "2:4"},
        {"scope": "layer"},
        {"layer_sparsity": {"h": 0.5}},
        {"speedup": 2.0, "sparsity": 0.5},
        {"speedup": 2.0, "units_and_zeros": True},
        {"granularity": "unit", "sparsity": 0.5, "units_and_zeros": True},
        {"granularity": "weight", "sparsity": 0.5, "units_and_zeros": True},
        {"speedup": 0.5},
        {"granularity": "weight", "speedup": 2.0},
        {"cost": "params!"},
    ],
)
def test_choices_that_contradict_units_are_refused(choices, rng):
    model = build(NETWORKS["Gemm chain"], rng)
    with pytest.raises(UsageError):
        onnx_ecp.optimize(model.proto, inputs(model, rng, 40), **{"granularity": "unit"} | choices)


@pytest.fixture(scope="module")
def mostly_dead(tmp_path_factory):
    """A network, samples, and what 90 % fewer weights make of it by default and uncut."""
    rng = np.random.default_rng(0)
    model = build(NETWORKS["Gemm chain"], rng)
    data = inputs(model, rng, 80)
    path = tmp_path_factory.mktemp("dead") / "masks.npz"
    choices = {"method": "magnitude", "sparsity": 0.9}
    return (
        onnx_ecp.optimize(model.proto, data, masks=path, **choices),
        onnx_ecp.optimize(model.proto, data, cleanup=False, **choices),
        model,
        data,
        path,
    )


def test_clean_up_is_on_by_default_reported_and_changes_no_output(mostly_dead):
    cleaned, whole, model, data, _ = mostly_dead
    assert {row.why for row in cleaned.report.units} <= {"dead", "unread"}
    assert cleaned.report.work_after.weights < cleaned.report.work_before.weights
    assert cleaned.report.result.parameters < whole.report.result.parameters
    assert whole.report.result.parameters >= model_parameters(model)
    assert (cleaned.report.zeros_after, cleaned.report.weights) == (
        whole.report.zeros_after,
        whole.report.weights,
    )
    wanted = run(whole.model, data)
    np.testing.assert_allclose(
        run(cleaned.model, data), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


def model_parameters(model):
    """Elements of all stored tensors."""
    return sum(int(np.prod(tensor.dims)) for tensor in model.proto.graph.initializer)


def test_masks_are_of_the_given_model_and_make_the_uncut_result(mostly_dead):
    cleaned, whole, model, data, path = mostly_dead
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.proto.graph.initializer}
    with np.load(path) as masks:
        assert {name: mask.shape for name, mask in masks.items()} == {n: stored[n] for n in masks}
    again = onnx_ecp.optimize(model.proto, data, method="magnitude", apply_masks=path)
    assert again.model == whole.model
    again = onnx_ecp.optimize(model.proto, data, method="magnitude", apply_masks=path, cleanup=True)
    assert again.model == cleaned.model


@pytest.mark.parametrize("encoding", ["dense", "sparse", "packed"])
def test_what_clean_up_leaves_is_written_in_every_format(mostly_dead, encoding, tmp_path):
    cleaned, _, model, data, _ = mostly_dead
    path = tmp_path / "out.onnx"
    written = onnx_ecp.optimize(
        model.proto, data, method="magnitude", sparsity=0.9, format=encoding, output=path
    )
    np.testing.assert_allclose(
        run(onnx.load(path), data), run(cleaned.model, data), rtol=1e-6, atol=1e-6
    )
    assert written.report.units == cleaned.report.units
    assert onnx_ecp.compare(model.proto, path, data).gap.samples == 80


def test_a_pattern_keeps_all_units_unless_clean_up_is_asked_for(rng):
    model = build(("float[N, 8] x", "h = MatMul(x, W)\n y = MatMul(h, V)", TWO_FOUR, [8]), rng)
    stored = next(t for t in model.proto.graph.initializer if t.name == "V")
    values = onnx.numpy_helper.to_array(stored).copy()
    values[3] = 0
    stored.CopyFrom(onnx.numpy_helper.from_array(values, "V"))
    data = inputs(model, rng, 40)
    assert onnx_ecp.optimize(model.proto, data, method="magnitude", sparsity=0.2).report.units
    kept = onnx_ecp.optimize(model.proto, data, method="magnitude", sparsity="2:4")
    assert not kept.report.units
    with pytest.raises(UsageError, match="N:M"):
        onnx_ecp.optimize(model.proto, data, sparsity="2:4", cleanup=True)


def test_clean_up_of_a_model_in_files_makes_the_same_model(rng, tmp_path):
    """What nobody cut is taken from the files as it was; the rest is in them by its new values."""
    shapes = {"W": (40, 30), "b": (40,), "V": (40, 20), "c": (1, 20), "U": (20, 3)}
    signature, body = "float[N, 30] x", NETWORKS["Gemm chain"][1]
    model = build((signature, body, shapes, []), rng)
    data, path = inputs(model, rng, 80), str(tmp_path / "model.onnx")
    files = onnx.ModelProto()
    files.CopyFrom(model.proto)
    onnx.save(files, path, save_as_external_data=True, location="weights", size_threshold=0)
    choices = {"method": "ecp", "sparsity": 0.95}
    wanted = onnx_ecp.optimize(model.proto, data, **choices)
    found = onnx_ecp.optimize(path, data, output=tmp_path / "out.onnx", **choices)
    assert wanted.report.units
    assert found.report.units == wanted.report.units
    assert onnx.load(tmp_path / "out.onnx").graph.initializer == wanted.model.graph.initializer
    np.testing.assert_array_equal(
        run(onnx.load(tmp_path / "out.onnx"), data), run(wanted.model, data)
    )


TWO_FOUR = {"W": (8, 8), "V": (8, 4)}


def test_clean_up_leaves_layers_alone_that_were_not_pruned(rng):
    model = build(NETWORKS["Gemm chain"], rng)
    stored = next(t for t in model.proto.graph.initializer if t.name == "V")
    values = onnx.numpy_helper.to_array(stored).copy()
    values[2] = 0
    stored.CopyFrom(onnx.numpy_helper.from_array(values, "V"))
    data = inputs(model, rng, 40)
    choices = {"method": "magnitude", "sparsity": 0.2}
    assert onnx_ecp.optimize(model.proto, data, **choices).report.units
    result = onnx_ecp.optimize(model.proto, data, exclude="^k$", **choices)
    assert not result.report.units
    after = next(t for t in result.model.graph.initializer if t.name == "V")
    assert after == stored


def test_a_search_tells_units_apart_whose_weights_are_zero_already(rng):
    """Masks of weights are the same whether such a unit is there or not."""
    model = build(NETWORKS["Gemm chain"], rng)
    for tensor in model.proto.graph.initializer:
        if tensor.name in "WbV":  # units 0 to 2 of h
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:3] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    made = onnx_ecp.optimize(
        model.proto,
        inputs(model, rng, 60),
        granularity="unit",
        method="magnitude",
        max_error=1e-5,
    )
    assert sum(row.before - row.after for row in made.report.units) > 0
    assert made.report.gap.relative_error <= 1e-5


def test_a_search_that_can_remove_nothing_says_so(rng):
    model = build(NETWORKS["Gemm chain"], rng)
    with pytest.raises(TargetError, match="nothing can be removed"):
        onnx_ecp.optimize(
            model.proto,
            inputs(model, rng, 60),
            granularity="unit",
            method="magnitude",
            max_error=0.9,
            unit_multiple=512,
        )


@pytest.mark.parametrize("method", ["ecp-refit", "ecp", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_zeros_that_are_there_already_count_in_the_target_as_in_the_report(method, sparsity, rng):
    model = build(NETWORKS["Gemm chain"], rng).proto
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.ndim == 2 and tensor.name in ("W", "V", "U"):
            values[rng.random(values.shape) < 0.25] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    data = inputs(Model(model, None, None), rng, 60)
    found = onnx_ecp.optimize(
        model, data, method=method, granularity="unit", sparsity=sparsity, stages=2
    ).report
    before = sum(layer.zeros_before for layer in found.layers)
    assert before > 0
    assert found.sparsity >= sparsity
    largest = max(5 + 4, 6 + 3) + 1  # the weights of one unit of any group
    assert found.zeros_after - largest < sparsity * found.weights
