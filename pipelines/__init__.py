"""Kubeflow pipelines, their compiled form, and the local runner."""
