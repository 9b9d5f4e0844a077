"""The way back into a format, one file for a family: rows of a weight as the bytes of its parts."""
