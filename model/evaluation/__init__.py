"""Metrics, replay, gates and plots."""
