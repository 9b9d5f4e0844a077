"""Repositories of the Hugging Face Hub: read like folders, written in one commit."""
