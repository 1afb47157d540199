"""Laws of the whole tree: nothing that runs foreign bytes, imports go down only, what is imported is declared, versions have one source."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = PROJECT["tool"]["importlinter"]["root_packages"]
FILES = sorted(path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py"))
RUNTIME = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
DEVELOPMENT = [Requirement(text) for text in PROJECT["project"]["optional-dependencies"]["dev"]]
PINS = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
}

# ---------------------------------------------------------------------------------------------------------------------
# Nothing unpickles or evaluates (RCE by data or model files)

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec", "__import__"}
UNSAFE_CALLS = {("yaml", "load"), ("yaml", "load_all"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch", "load"), ("torch", "save")}
UNSAFE_ATTRIBUTES = {"read_pickle", "to_pickle"}


def unsafe(tree: ast.AST) -> list[str]:
    """What a parsed file does that could run bytes it reads; 'line N: what'."""
    hits = []
    for node in ast.walk(tree):
        what = None
        if isinstance(node, ast.Import):
            what = next((alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES), None)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            what = node.module if module in UNSAFE_MODULES else next((f"{module}.{alias.name}" for alias in node.names if (module, alias.name) in UNSAFE_CALLS), None)
        elif isinstance(node, ast.Attribute):
            if node.attr in UNSAFE_ATTRIBUTES:
                what = node.attr
            elif isinstance(node.value, ast.Name) and (node.value.id, node.attr) in UNSAFE_CALLS:
                what = f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_BUILTINS:
                what = node.func.id
            elif any(word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False) for word in node.keywords):
                what = "allow_pickle"
            elif any(isinstance(value, ast.Constant) and value.value in UNSAFE_MODULES for value in node.args) and "import" in ast.unparse(node.func):
                what = ast.unparse(node)
        if what:
            hits.append(f"line {node.lineno}: {what}")
    return hits


@pytest.mark.parametrize("source", [
    "import pickle", "import joblib as j", "from cloudpickle import loads", "def f():\n    import dill.source", "from torch import load", "eval('1')", "exec(text)",
    "yaml.load(text, Loader=yaml.SafeLoader)", "torch.load(path, weights_only=True)", "pandas.read_pickle(path)", "frame.to_pickle(path)",
    "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "importlib.import_module('pickle')", "__import__(name)",
])  # fmt: skip
def test_the_scan_finds_what_is_unsafe(source):
    assert unsafe(ast.parse(source))


@pytest.mark.parametrize("source", ["network.eval()", "yaml.safe_load(text)", "np.load(path, allow_pickle=False)", "safetensors.torch.load(data)", "load_json(path)"])
def test_the_scan_leaves_what_is_safe(source):
    assert not unsafe(ast.parse(source))


ATTACKS = {"tests/unit/test_model_bundle.py": {"pickle", "torch.save"}}
"""Tests that write hostile files to show that loading refuses them; they read none."""


def test_nothing_in_the_tree_unpickles_or_evaluates():
    assert len(FILES) > 100
    found = {}
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        hits = [hit for hit in unsafe(ast.parse(path.read_text())) if hit.partition(": ")[2] not in ATTACKS.get(name, set())]
        if hits:
            found[name] = hits
    assert not found
    for name in ATTACKS:
        reads = [node for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("pickle.load", "pickle.Unpickler"))]
        assert not reads, name


# ---------------------------------------------------------------------------------------------------------------------
# Imports


def test_imports_between_the_rooms_go_down_only():
    found = subprocess.run([Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout


def imported(paths: list[Path]) -> set[str]:
    """Top-level names of absolute imports."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(ROOMS)


@pytest.mark.parametrize(("folders", "declared"), [(ROOMS, RUNTIME), (["tests"], RUNTIME + DEVELOPMENT)], ids=["rooms", "tests"])
def test_what_is_imported_is_declared(folders, declared):
    paths = [path for path in FILES if path.relative_to(ROOT).parts[0] in folders and path != ROOT / "benchmarks" / "peer_recbole.py"]  # runs in the peer's own Python
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    known = {canonicalize_name(requirement.name) for requirement in declared}
    distributions = metadata.packages_distributions()
    undeclared = {name for name in imported(paths) - ours if not known & {canonicalize_name(found) for found in distributions.get(name, [])}}
    assert not undeclared


# ---------------------------------------------------------------------------------------------------------------------
# Versions: lower bounds in pyproject.toml, exact ones in constraints.txt


@pytest.mark.parametrize("requirement", RUNTIME + DEVELOPMENT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_pinned_once_and_installed_as_pinned(requirement):
    exact = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(exact), f"constraints.txt has {exact}, pyproject.toml wants {requirement.specifier}"
    assert not any(part.operator == "==" for part in requirement.specifier), "exact versions belong to constraints.txt"
    assert Version(metadata.version(requirement.name)).public == exact, "make env"


def test_constraints_name_each_package_once_and_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINS)
    assert all(Version(version) for version in PINS.values())


@pytest.mark.parametrize(("name", "least"), [("torch", "2.10"), ("pyarrow", "14.0.1"), ("feast", "0.63"), ("bentoml", "1.4.39")])
def test_pins_are_past_the_known_advisories(name, least):
    assert Version(PINS[name]) >= Version(least)
