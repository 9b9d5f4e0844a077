"""Quantised bases: told by their tensors, read as the plain models that they stand for."""
