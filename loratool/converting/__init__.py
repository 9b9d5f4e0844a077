"""An adapter in another dialect: written, read again, and held against what it was."""
