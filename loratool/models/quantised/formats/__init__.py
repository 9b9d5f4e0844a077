"""The formats that are read, one file for a family: how a weight is stored, and both ways of it."""
