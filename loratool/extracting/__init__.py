"""A fine-tune taken apart into factors."""
