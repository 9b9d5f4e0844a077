"""Model cards: README.md for the Hub, from what a folder itself tells."""
