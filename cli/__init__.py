"""The `ega` command."""
