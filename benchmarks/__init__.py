"""Tables and speed measurements."""
