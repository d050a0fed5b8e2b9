"""Calibration and evaluation data: their sources, checks, splits and labels."""
