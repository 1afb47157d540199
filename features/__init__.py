"""Features from logs: snapshots, the Feast store (offline and online), encoding, request samples."""
