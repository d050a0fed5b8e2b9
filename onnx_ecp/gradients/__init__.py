"""Sensitivities through ONNX Runtime: the observation graph, its reverse, finite differences."""
