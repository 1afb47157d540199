"""The four training stages, their data and their checkpoints."""
