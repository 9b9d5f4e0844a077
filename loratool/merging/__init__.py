"""Base + adapters, in one stream; its undo; its proof."""
