"""Bytes, here or on the Hub: files by name, tensors by range, outputs all or nothing."""
