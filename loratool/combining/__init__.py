"""Adapters side by side."""
