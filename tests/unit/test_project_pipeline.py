"""The compiled pipeline in the repository is what the code says, with what a cluster needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml

from model.kinds import STAGES
from pipelines.arguments import pipeline_arguments
from pipelines.compile import FOLDER
from pipelines.config import load_run_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"reject-candidate"}
"""Steps that only repeat a text: no volume, no secret, no resources of their own."""


@pytest.fixture(scope="module")
def documents():
    spec, platform = yaml.safe_load_all((FOLDER / "train_and_approve.yaml").read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def executors(documents):
    return {name.removeprefix("exec-"): content["container"] for name, content in documents[0]["deploymentSpec"]["executors"].items()}


def test_the_compiled_pipelines_equal_the_code(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "EGA_IMAGE"} | {"PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, "-m", "cli.main", "compile", "--out", tmp_path], cwd=ROOT, env=environment, check=True, timeout=120)
    assert {path.name for path in tmp_path.iterdir()} == {"train_and_approve.yaml", "monitor_experiment.yaml"}
    for compiled in tmp_path.iterdir():
        assert compiled.read_bytes() == (FOLDER / compiled.name).read_bytes(), "the pipeline changed: `ega compile`"


def test_defining_a_pipeline_searches_no_modules_for_the_caller(monkeypatch):
    """kfp's setters call inspect.stack() for an error message: 8 s of CPU in `ega run`, a minute and a half here."""
    from kfp import dsl

    from pipelines.train_and_approve import train_and_approve

    monkeypatch.setattr("inspect.stack", lambda *_: pytest.fail("inspect.stack() was called"))
    again = dsl.pipeline(train_and_approve.pipeline_func, name="train-and-approve", description=train_and_approve.description)
    assert len(again.pipeline_spec.deployment_spec["executors"]) == len(train_and_approve.pipeline_spec.deployment_spec["executors"])


def test_every_step_is_there(executors):
    stages = {"train-stage", *(f"train-stage-{number}" for number in range(2, sum(map(len, STAGES.values())) + 1))}
    assert set(executors) == stages | SMALL | {
        "validate-logs", "build-features", "sample-requests", "evaluate-candidate", "approve-model", "publish-ad-embeddings",
    }  # fmt: skip


def test_steps_have_an_image_limits_and_no_packages_to_install(executors):
    for name, container in executors.items():
        assert container["image"] == "ega:0.1.0"
        assert "pip install" not in " ".join(container["command"] + container["args"])
        if name not in SMALL:
            resources = container["resources"]
            for limit in ("resourceCpuLimit", "resourceCpuRequest", "resourceMemoryLimit", "resourceMemoryRequest"):
                assert resources[limit], (name, limit)


def test_steps_do_not_report_home(executors):
    for name, container in executors.items():
        if name not in SMALL:
            variables = {entry["name"]: entry["value"] for entry in container["env"]}
            assert variables["DO_NOT_TRACK"] == "1" and variables["BENTOML_DO_NOT_TRACK"] == "True" and variables["GX_ANALYTICS_ENABLED"] == "false"


def test_steps_mount_the_volume_and_get_the_signing_key_as_a_secret(documents, executors):
    for name in set(executors) - SMALL:
        kubernetes = documents[1][f"exec-{name}"]
        assert [mount["mountPath"] for mount in kubernetes["pvcMount"]] == ["/ega"]
        (secret,) = kubernetes["secretAsEnv"]
        assert secret["secretName"] == "ega-signing-key"
        assert secret["keyToEnv"] == [{"envVar": "EGA_SIGNING_KEY", "secretKey": "key"}]


def test_failed_data_checks_are_not_tried_again_but_training_is(documents):
    assert documents[0]["root"]["dag"]["tasks"]["validate-logs"].get("retryPolicy", {}).get("maxRetryCount", 0) == 0
    assert all(task["retryPolicy"]["maxRetryCount"] >= 1 for task in training(documents))


def test_each_kind_of_model_has_its_chain_of_stages(documents):
    chains = [
        [task["inputs"]["parameters"]["stage"]["runtimeValue"]["constant"] for _, task in sorted(tasks.items(), key=lambda item: int(item[0].removeprefix("train-stage").lstrip("-") or 1))]
        for tasks in branches(documents)
    ]  # fmt: skip
    assert sorted(map(tuple, chains)) == sorted(STAGES.values())


def branches(documents):
    """The training tasks of each branch of the pipeline."""
    found = [{name: task for name, task in component["dag"]["tasks"].items() if name.startswith("train-stage")} for component in documents[0]["components"].values() if "dag" in component]
    return [tasks for tasks in found if tasks]


def training(documents):
    return [task for tasks in branches(documents) for task in tasks.values()]


def test_verdicts_are_never_cached(documents):
    tasks = documents[0]["root"]["dag"]["tasks"]
    assert not tasks["evaluate-candidate"]["cachingOptions"].get("enableCache")
    assert all(task["cachingOptions"]["enableCache"] for task in training(documents))


def test_arguments_are_exactly_the_pipelines_inputs(documents):
    config = load_run_config(ROOT / "config" / "ci.yaml")
    arguments = pipeline_arguments(config, PurePosixPath("/ega/logs"), PurePosixPath("/ega/runs/a"), PurePosixPath("/ega/home/ci"))
    inputs = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert set(arguments) == set(inputs)
    kinds = {"STRING": str, "NUMBER_INTEGER": int, "BOOLEAN": bool}
    assert all(type(arguments[name]) is kinds[entry["parameterType"]] for name, entry in inputs.items())


def test_components_are_thin_wrappers():
    for path in sorted((ROOT / "components").glob("*/component.py")):
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body), f"{path}: KFP needs real annotations"
        (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        _, *body = function.body
        assert ast.get_docstring(function), path
        assert function.end_lineno - body[0].lineno < 25, f"{path}: the work belongs to a function of a room below"


def test_the_monitoring_pipeline_takes_nothing_from_the_cache_and_ends_both_ways():
    spec, platform = yaml.safe_load_all((FOLDER / "monitor_experiment.yaml").read_text())
    tasks = spec["root"]["dag"]["tasks"]
    assert not any(tasks[name]["cachingOptions"].get("enableCache") for name in ("join-events", "judge-experiment"))
    names = {name.removeprefix("exec-") for name in spec["deploymentSpec"]["executors"]}
    assert names == {"join-events", "judge-experiment", "merge-logs", "keep-model"}
    assert any("condition-branches" in name for name in spec["components"])
    mounted = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(mounted) == {f"exec-{name}" for name in names - {"keep-model"}}
