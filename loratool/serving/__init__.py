"""Which programs load an adapter as it is, by the rules in their sources: one file for each."""
