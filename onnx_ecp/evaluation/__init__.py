"""What a model or a pair of models is like: size, latency, gap, bounds, eligible kernels."""
