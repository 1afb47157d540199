"""Identity of the code that a step runs: KFP's cache key does not see the packages that a component imports."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOMS = ("auction", "marketplace", "features", "feature_repo", "model", "serving", "components", "pipelines")


def code_version() -> str:
    """First 12 hex digits of the sha256 over names and contents of all Python files of the rooms that steps import."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
