"""How architectures name their weights, store them, and tie them."""
