"""Statistics of the layers: observe batches, sum them up in float64."""
