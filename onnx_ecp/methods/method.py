"""What a pruning method is: an importance, a compensation, and what both must know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_ecp.linalg.masked import damped, inverse_diagonal
from onnx_ecp.linalg.rows import per_row
from onnx_ecp.methods.refit import refit
from onnx_ecp.statistics.curvature import Curvature
from onnx_ecp.statistics.gram import Gram
from onnx_ecp.statistics.moments import Moments

# Each step needs all that the steps before it need, but that curvature goes without gradients.
# "means" are the sensitivities of units and the means of inputs weighted by them (bb and wb of
# ``Moments``); "sensitivities" are those of weights besides (ww).
NEEDS = ("nothing", "activations", "means", "sensitivities", "gradients", "curvature")
# Which weights of a layer stay, of as many as a ranking leaves it: the highest, or those that ADMM
# finds (``admm.py``), where the compensation refits.
SUPPORTS = ("ranking", "admm")
# Those that need no sensitivity of any kind.
FORWARD = ("nothing", "activations")


@dataclass(frozen=True)
class View:
    """What a method may look at when it ranks the weights of one layer.

    Args:
        weight: (out, in) float64, the weights as they are now.
        moments: of the layer; None where the method needs nothing.
        rng: seeded generator of this layer.
        gram: of the layer's inputs; None where the method does not walk.
        damping: ridge: of the Gram matrix, as a share of its mean diagonal; of the curvature, as
            it is.
        tensor: name of the stored tensor behind the layer.
        uses: how many layers share it.
        curvature: of the block that it belongs to; None where the method does not need it.
        effects: (out, in), mean squared change of the outputs when a weight is removed, as it was
            measured; None where the method does not need it.
    """

    weight: np.ndarray
    moments: Moments | None
    rng: np.random.Generator
    gram: Gram | None = None
    damping: float = 1e-2
    tensor: str = ""
    uses: int = 1
    curvature: Curvature | None = None
    effects: np.ndarray | None = None

    @property
    def seen(self) -> Moments:
        """The moments of a method that said it needs them."""
        assert self.moments is not None, "the method's `needs` must name what it reads"
        return self.moments

    def per_row(self, x: np.ndarray) -> np.ndarray:
        """(groups, in) values repeated for the rows of W: (out, in)."""
        return per_row(x, len(self.weight))

    def removal_cost(self, hessian: np.ndarray) -> np.ndarray:
        """``1 / [H^-1]_jj`` (out, in): what a weight of 1 costs when its row makes the best of it.

        Args:
            hessian: H of every group (groups, in, in); damped here, and for each row cut to the
                columns that the row still has. Where it has none the cost is 0.
        """
        cost = np.zeros_like(self.weight)
        rows = np.split(np.arange(len(self.weight)), len(hessian))
        for matrix, group in zip(hessian, rows, strict=True):
            present = self.weight[group] != 0
            freedom = inverse_diagonal(damped(matrix, self.damping), present)
            cost[group] = np.divide(1.0, freedom, out=np.zeros_like(freedom), where=present)
        return cost


Importance = Callable[[View], np.ndarray]


@dataclass(frozen=True)
class LayerProblem:
    """One layer whose kept weights are to make good for the removed ones.

    Args:
        weight: (out, in) before this stage removed anything.
        original: (out, in) before any stage did.
        present: (out, in), what was there before this stage.
        keep: (out, in), True where the weight stays.
        may_reselect: whether other weights may stay, as long as equally many do; with a
            ``block``, as many of every block of every row.
        gram: of the layer's inputs, in the network that the layers before it make now.
        damping: ridge as a share of the mean diagonal.
        block: M of N:M, the length of the blocks of columns that have their own number of zeros; 0
            where there are none.
        order: permutation of the columns that makes blocks consecutive; None: as they are.
        sensitivity: (out,), of the outputs to every unit; all ones where it is not measured.
        candidates: (out, in), what may stay where another mask is chosen.
    """

    weight: np.ndarray
    original: np.ndarray
    present: np.ndarray
    keep: np.ndarray
    may_reselect: bool
    gram: Gram
    damping: float
    block: int = 0
    order: np.ndarray | None = None
    sensitivity: np.ndarray = field(default_factory=lambda: np.ones(0))
    candidates: np.ndarray = field(default_factory=lambda: np.ones((0, 0), np.bool_))

    def solved(self, solve: Callable[[Part], tuple[np.ndarray, np.ndarray]]) -> Solved:
        """Put together from parts: the rows of W that share an input, columns in ``order``.

        Args:
            solve: from a part to its new weights and mask, both (rows, in).
        """
        order = np.arange(self.weight.shape[1]) if self.order is None else self.order
        back = np.argsort(order)
        weight, keep = np.empty_like(self.weight), np.empty_like(self.keep)
        out = len(weight) // len(self.gram.weight)
        for g, moments in enumerate(self.gram.second_moments):
            rows = slice(g * out, (g + 1) * out)
            part = Part(
                self.weight[rows][:, order],
                damped(moments[np.ix_(order, order)], self.damping),
                self.present[rows][:, order],
                self.keep[rows][:, order],
                self.may_reselect,
                self.block,
            )
            found = solve(part)
            weight[rows], keep[rows] = found[0][:, back], found[1][:, back]
        return Solved(weight, keep)


@dataclass(frozen=True)
class Part:
    """Rows of a layer that share an input; blocks are consecutive columns.

    Args:
        weight: (rows, in), zero where nothing is there.
        hessian: (in, in), E[a a^T] of their input with the ridge on its diagonal.
        present: (rows, in), see ``LayerProblem``.
        keep: (rows, in).
        may_reselect: whether another mask may be chosen.
        block: length of the blocks, or 0.
    """

    weight: np.ndarray
    hessian: np.ndarray
    present: np.ndarray
    keep: np.ndarray
    may_reselect: bool
    block: int


@dataclass(frozen=True)
class Solved:
    """What a layer becomes.

    Args:
        weight: (out, in), zero where not kept.
        keep: (out, in), True where the weight stays.
        shift: (out,) against the original bias; None leaves the bias as it is.
    """

    weight: np.ndarray
    keep: np.ndarray
    shift: np.ndarray | None = None


@dataclass(frozen=True)
class BlockProblem:
    """All kept weights of a block of stored tensors, which are to make good for the removed ones.

    Args:
        weight: by stored tensor, (out, in) before this stage removed anything.
        keep: by stored tensor, (out, in), True where the weight stays.
        curvature: of the block.
        damping: ridge of the curvature, added to its diagonal as it is.
    """

    weight: Mapping[str, np.ndarray]
    keep: Mapping[str, np.ndarray]
    curvature: Curvature
    damping: float

    @property
    def removed(self) -> dict[str, np.ndarray]:
        """By stored tensor, the weights (out, in) that go, 0 elsewhere."""
        return {n: np.where(self.keep[n], 0.0, w) for n, w in self.weight.items()}


@dataclass(frozen=True)
class MaskProblem:
    """Which weights of a group of stored tensors are to go.

    Args:
        weight: by stored tensor, (out, in) before this stage removed anything.
        present: by stored tensor, (out, in), what was there then.
        start: by stored tensor, (out, in), a mask with the right number of zeros.
        blocks: the curvature of all weights, block by block.
        elsewhere: by stored tensor of other groups, the weights (out, in) that go there.
        error: the loss of the network, on all samples, with these masks and no compensation.
        rng: seeded generator.
        block: M of N:M, or 0: each block of each row keeps its number of zeros.
        orders: by stored tensor, the permutation of columns that makes blocks consecutive.
    """

    weight: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    start: Mapping[str, np.ndarray]
    blocks: Sequence[Curvature]
    elsewhere: Mapping[str, np.ndarray]
    error: Callable[[Mapping[str, np.ndarray]], float]
    rng: np.random.Generator
    block: int = 0
    orders: Mapping[str, np.ndarray | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Compensation:
    """How what stays makes good for the removed weights.

    Args:
        needs: what must be measured: a name in NEEDS.
        shifts: whether biases are shifted, to first order, before anything else.
        solve: what each layer becomes, one after the other, in the network that the layers before
            it make; None changes no weights.
        update: new weights (out, in) by stored tensor, all at once; None changes none.
        weighted: whether a LayerProblem's Gram matrix looks at the original network too, and its
            rows count by their sensitivities.
        guarded: whether a solution must not have a larger error on held-out samples than none.
        joint: whether all layers are refitted together after the last stage.
        shrinkage: q of the weights of those rows, ``(1 - q) s + q mean(s)``, however much those of
            the importance are shrunk.
        damping: of the problem, unless ``--damping`` is given.
        summary: what changes to compensate, in a few words.
    """

    needs: str = "nothing"
    shifts: bool = False
    solve: Callable[[LayerProblem], Solved] | None = None
    update: Callable[[BlockProblem], dict[str, np.ndarray]] | None = None
    weighted: bool = False
    guarded: bool = False
    joint: bool = False
    shrinkage: float = 0.0
    damping: float = 1e-2
    summary: str = ""


def _refitted(problem: LayerProblem) -> Solved:
    weight, shift = refit(
        problem.gram, problem.original, problem.keep, problem.damping, problem.weight
    )
    return Solved(weight, problem.keep, shift)


_REFIT = Compensation(
    "means",
    shifts=True,
    solve=_refitted,
    weighted=True,
    guarded=True,
    shrinkage=0.3,  # see ecp_refit.py
    summary="remaining weights and biases, layer by layer",
)

COMPENSATIONS: dict[str, Compensation] = {
    "none": Compensation(summary="nothing"),
    "bias": Compensation("means", shifts=True, summary="biases"),
    "refit": _REFIT,
    "joint": replace(
        _REFIT,
        joint=True,
        summary="remaining weights and biases, layer by layer, then of all layers together",
    ),
}


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Args:
        importance: from a View to (out, in) float64 >= 0; the smallest goes first.
        search: from the masks that the importances give, by stored tensor, to better ones; None
            takes them as they are.
        compensation: a name in COMPENSATIONS.
        needs: what the importance reads: a name in NEEDS.
        needs_gram: whether it reads the Gram matrix too; costs a walk per stage.
        needs_effects: whether it reads what the removal of each weight does; a run for each weight.
        stages: how many times observe, score, select, compensate are repeated.
        shrinkage: q of ``Moments.shrunk``, of the importance.
        floor: least density of a layer as a share of the density of all layers.
        in_output_units: whether the importance is the expected squared output error of the removal.
        damping: of the View, unless ``--damping`` is given.
        scope: what ``--scope`` is unless given.
        may_reselect: whether the compensation may choose anew which weights of a layer stay.
        unit_score: how the importance of a whole unit is measured: "weights" sums those of its
            weights, "bias" takes the unit as a constant that the next biases absorb, "refit" lets
            the units that remain absorb it (docs/method.md, section 5).
        options: names of the options that only this method has; each is a switch, on by default.
        support: which weights of a layer stay, of as many as rank high enough: a name in SUPPORTS.
        summary: what the importance of a weight is, in one line, with the source.
    """

    importance: Importance
    search: Callable[[MaskProblem], dict[str, np.ndarray]] | None = None
    compensation: str = "none"
    needs: str = "nothing"
    needs_gram: bool = False
    needs_effects: bool = False
    stages: int = 1
    shrinkage: float = 0.0
    floor: float = 0.0
    in_output_units: bool = False
    damping: float = 1e-2
    scope: str = "global"
    may_reselect: bool = False
    unit_score: str = "weights"
    options: tuple[str, ...] = ()
    support: str = "ranking"
    summary: str = ""

    def with_parts(
        self,
        ranking: Method | None,
        compensation: str | None,
        stages: int | None,
        support: str | None = None,
    ) -> Method:
        """This method with another importance, compensation, ... (None: its own)."""
        method = self
        if ranking is not None:
            method = replace(
                method,
                importance=ranking.importance,
                search=ranking.search,
                needs=ranking.needs,
                needs_gram=ranking.needs_gram,
                needs_effects=ranking.needs_effects,
                in_output_units=ranking.in_output_units,
                damping=ranking.damping,
                unit_score=ranking.unit_score,
                may_reselect=False,
            )
        method = replace(
            method,
            compensation=compensation or method.compensation,
            stages=stages or method.stages,
            support=support or method.support,
        )
        return method if method.repair.weighted else replace(method, support="ranking")

    @property
    def repair(self) -> Compensation:
        """What the name of the compensation stands for."""
        return COMPENSATIONS[self.compensation]

    @property
    def measures(self) -> str:
        """The name in NEEDS of all that must be measured."""
        return max(self.needs, self.repair.needs, key=NEEDS.index)


def bias_shift(weight: np.ndarray, moments: Moments, keep: np.ndarray) -> np.ndarray:
    """Shift (out,) of the bias that makes good for the removed weights, to first order.

    The sum over a row of the single optima db*_ij = W_ij wb_ij / bb_i is the joint optimum of the
    linearised problem for a given mask (docs/method.md, section 1).

    Args:
        weight: (out, in) before removal.
        moments: of the layer.
        keep: (out, in), True where the weight stays.
    """
    return np.asarray((np.where(keep, 0.0, weight) * moments.gain).sum(axis=1))
