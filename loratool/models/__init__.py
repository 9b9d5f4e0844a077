"""Base models on disk: tensors and config, how architectures name and store them."""
