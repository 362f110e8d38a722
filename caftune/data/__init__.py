"""Rows of files and hub ids, and prompts."""
