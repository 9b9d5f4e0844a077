"""Is it base + adapters? Every value held against what it should be."""
