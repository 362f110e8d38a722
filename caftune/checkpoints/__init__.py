"""Heads and models on disk and on the hub."""
