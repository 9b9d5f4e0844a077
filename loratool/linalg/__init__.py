"""Low-rank algebra. Nothing here ever builds the dense `[out, in]` product."""
