"""Blocks through threads, in order, into output files."""
