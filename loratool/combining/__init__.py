"""Adapters side by side: aligned, combined, resized, compared."""
