"""onnx_ir: prune between its own passes. Needs: pip install onnx-ir."""

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from onnx_ecp.integrations.onnx_ir import PrunePass

prune = PrunePass("models/digits.npz", sparsity=0.8)
passes = ir.passes.Sequential(prune, ClearMetadataAndDocStringPass())
ir.save(passes(ir.load("models/digits.onnx")).model, "digits-ir.onnx")
print(f"{prune.report.zeros_after} zeros, output error {prune.report.gap.relative_error:.4f}")
