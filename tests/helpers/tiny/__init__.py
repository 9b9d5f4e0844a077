"""Tiny random models of the classes of transformers, and the table of layouts they give."""
