"""Adapters as values, read from and written to the files of their dialects."""
