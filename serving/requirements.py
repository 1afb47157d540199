"""What the service needs and training does not: deploy/serving-requirements.txt. `python -m serving.requirements` rewrites it.

The packages that serving imports, with everything they need in turn, in the versions of constraints.txt: a bento or an image that
installs exactly this file serves without kfp, great-expectations or evidently.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "deploy" / "serving-requirements.txt"
DIRECT = (
    "bentoml", "dask", "feast[redis]", "numpy", "pandas", "prometheus-client", "psutil", "pyarrow", "pydantic", "PyYAML", "safetensors", "starlette", "torch", "typeguard", "uvicorn",
)  # fmt: skip
"""What the code of the service imports; a test compares it with the imports."""
_CUDA = ("nvidia-", "cuda-", "triton")
"""What some builds of torch bring along: the installer chooses."""
TRAINING_ONLY = ("evidently", "great-expectations", "kfp", "kfp-kubernetes", "kfp-server-api", "matplotlib", "scipy")
"""Dependencies of the project that the service must do without."""


def closure() -> set[str]:
    """Canonical names of DIRECT and all they need, from the metadata of the installed distributions."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(name), "", "") for name in DIRECT]
    while waiting:
        requirement, extra, parent = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = str(canonicalize_name(requirement.name))
        if parent == "torch" and name.startswith(_CUDA):
            continue
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(line), wanted, name) for line in distribution(name).requires or ()]
    return found


def rendered() -> str:
    """The file: one pinned package a line, by name."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#")]
    needed = closure()
    chosen = sorted((line for line in pins if canonicalize_name(line.partition("==")[0]) in needed), key=str.lower)
    missing = needed - {canonicalize_name(line.partition("==")[0]) for line in chosen}
    if missing:
        raise ValueError(f"constraints.txt has no version of {', '.join(sorted(missing))}")
    return "# Made by `python -m serving.requirements` from constraints.txt.\n" + "".join(f"{line}\n" for line in chosen)


if __name__ == "__main__":
    FILE.write_text(rendered())
