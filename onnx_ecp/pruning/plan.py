"""How a network is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_ecp.methods import Method
from onnx_ecp.pruning.selection import RankingGroup

# What the curvature couples: all weights of the network, or those of a stored tensor.
BLOCKS = ("network", "layer")


@dataclass(frozen=True)
class Plan:
    """How a network is pruned.

    Args:
        method: importance, compensation, stages.
        groups: which stored tensors are ranked together, and to what sparsity.
        positions: "expand" or "reduce".
        damping: ridge of importance and compensation; None leaves each its own.
        seed: of the methods' random numbers.
        finetune_steps: of fine-tuning after the last stage; a tenth of it after every other one.
        blocks: what the curvature couples: a name in BLOCKS.
        last: whether no other stage follows, which looks at all of it again: until then
            sensitivities and masks need not be known to the last digit.
        with_levels: whether the first stage notes the importances, for a picture of them.
    """

    method: Method
    groups: tuple[RankingGroup, ...]
    positions: str = "expand"
    damping: float | None = None
    seed: int = 0
    finetune_steps: int = 0
    blocks: str = "network"
    last: bool = True
    with_levels: bool = False
