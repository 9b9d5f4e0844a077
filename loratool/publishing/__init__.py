"""To the Hub: what of a folder goes up, where to, with which card."""
