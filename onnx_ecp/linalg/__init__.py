"""Linear algebra in float64: Cholesky factors, masked systems."""
