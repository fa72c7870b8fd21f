"""Layers that keep one branch of the two: plans, measurements, weights."""
