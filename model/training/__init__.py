"""The training stages of every kind, their data and their checkpoints."""
