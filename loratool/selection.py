"""Which modules a command was asked for: by layer number and by glob."""

from __future__ import annotations

#: Kinds of tensors that can be left out as a whole: what `extract --skip` may be.
GROUPS = ("norms", "biases", "embeddings", "convs", "heads", "others")
