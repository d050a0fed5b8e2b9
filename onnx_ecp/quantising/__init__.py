"""int8 behind pruning: weights on a grid that keeps zeros, activations with calibrated ranges."""
