"""Checkpoints on disk: tensors by name, read by byte range, written all or nothing.

`tensors` says what a tensor in a file is and reads it; `config` reads JSON; `header` and `pickled`
find the tensors of a safetensors file and of a torch file; `base` puts the files of a model
together; `layout` knows how architectures name and lay out their weights; `sidefiles` carries
config and tokenizer; `writer` writes.
"""
