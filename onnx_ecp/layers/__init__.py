"""Affine layers in a graph: one file per spelling."""
