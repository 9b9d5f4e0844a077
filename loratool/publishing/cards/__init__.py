"""Model cards: what headers and records tell, as Markdown."""
