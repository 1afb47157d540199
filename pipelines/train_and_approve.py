"""The training pipeline: validated logs to an approved (or rejected) model. Compiled to train_and_approve.yaml beside this file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kfp import dsl, kubernetes

from components.approve_model.component import approve_model
from components.build_features.component import build_features
from components.evaluate_candidate.component import evaluate_candidate
from components.publish_ad_embeddings.component import publish_ad_embeddings
from components.reject_candidate.component import reject_candidate
from components.sample_requests.component import sample_requests
from components.train_stage.component import train_stage
from components.validate_logs.component import validate_logs
from model.kinds import STAGES
from pipelines.environment import ENVIRONMENT

VOLUME, MOUNT = "ega-runs", "/ega"
"""The claim that holds EGA_HOME, logs and runs on a cluster; paths given to the pipeline lie under MOUNT."""

SECRET, SECRET_KEY = "ega-signing-key", "key"  # noqa: S105 - the name of a secret
"""Kubernetes secret with the signing key as hex."""


def place(task: dsl.PipelineTask, cpu: str, memory: str, retries: int = 1) -> dsl.PipelineTask:
    """Resource requests, retries, volume and signing key of a step; ignored by local runs."""
    task.set_retry(num_retries=retries, backoff_duration="10s", backoff_factor=2.0)
    kubernetes.mount_pvc(task, pvc_name=VOLUME, mount_path=MOUNT)
    kubernetes.use_secret_as_env(task, secret_name=SECRET, secret_key_to_env={SECRET_KEY: "EGA_SIGNING_KEY"})
    with _no_stack_walks():
        task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
        for name, value in ENVIRONMENT:
            task.set_env_variable(name, value)
    return task


@contextmanager
def _no_stack_walks() -> Iterator[None]:
    """Each of kfp's setters asks `inspect.stack()` for its own name, in case the task is no container. That searches all loaded modules
    a frame: 8 s of CPU at every start of a run. Here only such a task is asked."""
    check = dsl.PipelineTask._ensure_container_spec_exists
    dsl.PipelineTask._ensure_container_spec_exists = lambda task: check(task) if task.container_spec is None else None
    try:
        yield
    finally:
        dsl.PipelineTask._ensure_container_spec_exists = check


@dsl.pipeline(name="train-and-approve", description="Validate logs, build features, train EGA-V1, a cascade or EGA (V2) in stages, gate it, approve it.")
def train_and_approve(
    logs: str,
    run_dir: str,
    home: str,
    validation: str,
    behaviours: int,
    fresh: bool,
    sampling: str,
    kind: str,
    model: str,
    training: str,
    candidate: str,
    seed: int,
    code_version: str,
) -> str:
    """From a folder of logs to a verdict.

    Args:
        logs: Folder of logs.
        run_dir: Folder of this run.
        home: State of the configuration: feature store, model store, accepted figures.
        validation: ValidationConfig as JSON.
        behaviours: L, behaviours kept per user.
        fresh: Start from an empty feature store: for simulated runs.
        sampling: SamplingConfig as JSON.
        kind: Kind of model, `model.kind`.
        model: NetworkConfig as JSON.
        training: TrainingConfig as JSON.
        candidate: CandidateConfig as JSON.
        seed: Seed of sampling and initialisation.
        code_version: Hash of the code.

    Returns:
        The approved model's tag, or "rejected: reason".
    """
    valid = place(validate_logs(logs=logs, run_dir=run_dir, home=home, config=validation, code_version=code_version), "2", "8G", retries=0)
    built = place(build_features(logs=logs, home=home, behaviours=behaviours, fresh=fresh, data_hash=valid.outputs["Output"], code_version=code_version), "2", "16G")
    sampled = place(
        sample_requests(logs=logs, home=home, run_dir=run_dir, config=sampling, seed=seed, as_of=built.outputs["Output"], code_version=code_version), "2", "16G"
    )

    def train(stages: tuple[str, ...]) -> Any:
        """The stages in a chain; returns the last one's output."""
        previous = ""
        for stage in stages:
            trained = train_stage(
                stage=stage, samples=sampled.outputs["Output"], run_dir=run_dir, model_config=model, training=training, seed=seed, previous=previous,
                code_version=code_version,
            )  # fmt: skip
            previous = place(trained, "8", "32G").set_display_name(f"train {stage}").outputs["Output"]
        return previous

    with dsl.If(kind == "ega_v1", name="ega_v1"):
        ega_v1 = train(STAGES["ega_v1"])
    with dsl.Elif(kind == "mca", name="mca"):
        mca = train(STAGES["mca"])
    with dsl.Elif(kind == "fs_ltr", name="fs_ltr"):
        fs_ltr = train(STAGES["fs_ltr"])
    with dsl.Else(name="ega_v2"):
        ega_v2 = train(STAGES["ega_v2"])
    judged = place(
        evaluate_candidate(
            samples=sampled.outputs["Output"], logs=logs, run_dir=run_dir, home=home, config=candidate, seed=seed,
            weights=dsl.OneOf(ega_v1, mca, fs_ltr, ega_v2),
            code_version=code_version,
        ),
        "8",
        "32G",
    )
    # A verdict depends on the store and a rejection must stay a rejection: never taken from a cache.
    judged.set_caching_options(False)
    with dsl.If(judged.outputs["Output"] == True, name="approved"):  # noqa: E712 - KFP compiles the comparison
        tag = place(approve_model(run_dir=run_dir, home=home, code_version=code_version), "1", "4G").set_caching_options(False)
        published = place(publish_ad_embeddings(run_dir=run_dir, home=home, tag=tag.output, code_version=code_version), "2", "8G")
    with dsl.Else():
        rejected = reject_candidate(reason=judged.outputs["reason"])
    return dsl.OneOf(published.outputs["Output"], rejected.output)
