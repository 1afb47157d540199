"""The BentoML ranking service and what it stands on."""
