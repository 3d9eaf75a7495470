"""Operators and their implementations: the Python side of csrc. Imports nothing of the project."""
