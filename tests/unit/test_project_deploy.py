"""deploy/: what it names exists, and the bento's requirements are what the service needs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.metrics import MetricWrapperBase

from serving import metrics, requirements

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def ours() -> set[str]:
    """Every name that the service's metrics have on /metrics."""
    names: set[str] = set()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for family in metric.describe():
                endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[family.type]
                names |= {family.name + ending for ending in endings}
    return names


def test_dashboard_and_alarms_name_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "ega.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [rule for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    named = set(re.findall(r"\bega_\w+", " ".join(asked + [rule["expr"] for rule in rules])))
    assert named - ours() == set() and len(rules) > 3
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in ours()}
    drawn = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in named}
    assert families - drawn == set(), "a metric that nobody draws"
    boxes = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(boxes)) == len(boxes) and all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])


def test_compose_mounts_files_that_exist_and_keeps_secrets_out() -> None:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    assert set(compose["services"]) == {"service", "redis", "prometheus", "grafana"}
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    environment = compose["services"]["service"]["environment"]
    assert f"ega:{version}" in compose["services"]["service"]["image"] and environment["EGA_SERVING_TOKEN"].startswith("${")
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["service:3000"] and scrape["authorization"]["credentials_file"].endswith(next(iter(compose["secrets"])))


def test_the_requirements_of_the_bento_are_pinned_and_hold_no_training() -> None:
    assert requirements.FILE.read_text() == requirements.rendered(), "run `python -m serving.requirements` and commit deploy/serving-requirements.txt"
    named = {canonicalize_name(line.partition("==")[0]) for line in requirements.FILE.read_text().splitlines() if "==" in line}
    assert named.isdisjoint(requirements.TRAINING_ONLY)
    assert yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["requirements_txt"] == str(requirements.FILE.relative_to(ROOT))


def test_what_the_service_imports_is_required() -> None:
    direct = {canonicalize_name(Requirement(name).name) for name in requirements.DIRECT}
    rooms = {"serving", "features", "feature_repo", "model", "marketplace", "auction"}
    packed = [*ROOT.glob("serving/*.py"), *(ROOT / "features" / f"{name}.py" for name in ("store", "encoding"))]
    packed = [path for path in packed if path.name != "requirements.py"]
    imported: set[str] = set()
    for path in packed:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    outside = imported - rooms - set(sys.stdlib_module_names)
    assert {name for name in outside if direct.isdisjoint(canonicalize_name(found) for found in distributions[name])} == set()


def test_every_kind_of_model_answers_with_nothing_but_the_required_packages() -> None:
    """Service, engines, kinds of model and tokenizer, where no other installed package can be imported."""
    needed = requirements.closure()
    others = {name for name, found in packages_distributions().items() if needed.isdisjoint(canonicalize_name(each) for each in found) and "ega" not in found}
    assert {"kfp", "scipy", "sklearn", "threadpoolctl"} <= others and others.isdisjoint({"torch", "feast", "bentoml"})
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
import numpy as np
import model.ega_v1.engine, model.ega_v2.engine, serving.admin, serving.assembly, serving.policies, serving.service
from model.ega_v1.network import NetworkConfig, VocabularySizes
from model.kinds import STAGES, create
from model.ega_v2.tokenizer import Tokenizer, TokenizerConfig
sizes = VocabularySizes(ad=5, poi=5, advertiser=5, category=5, geo=5, creative=5)
for kind in STAGES:
    create(NetworkConfig(kind=kind, width=16), sizes)
print(Tokenizer(np.random.default_rng(0).random((3, 8, 4)), TokenizerConfig(layers=3, codes=8), health=None).encode(np.zeros((5, 4))).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "(5, 3)", done.stderr
