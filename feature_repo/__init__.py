"""Feast definitions and configuration; the command line applies `definitions.py`, `features.store` opens the same definitions under a home."""
