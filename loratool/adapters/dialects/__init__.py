"""The ways adapters lie in files."""
