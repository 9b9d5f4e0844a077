"""The version of loratool."""

__version__ = "0.1.0"
