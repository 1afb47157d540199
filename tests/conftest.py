"""Its presence puts this folder on the import path, so that tests share `poisons` and the fixtures beside it."""

from __future__ import annotations

from hypothesis import settings

# The suite draws the same examples every time; a busy machine must not fail a law. `--hypothesis-profile=default` draws others.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
