"""Bit for bit back: what a merge keeps of its base, and the base written again."""
