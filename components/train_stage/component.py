"""One stage of training; the pipeline chains those of a kind of model."""

from kfp import dsl
from kfp.dsl import HTML, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_stage(
    stage: str,
    samples: str,
    run_dir: str,
    model_config: str,
    training: str,
    seed: int,
    previous: str,
    code_version: str,
    model: Output[Model],
    curve: Output[HTML],
    metrics: Output[Metrics],
) -> str:
    """Train a stage, or resume it from its last checkpoint, or find it done.

    Args:
        stage: One of the kind's stages, e.g. pretrain.
        samples: Sample folder.
        run_dir: Folder of the run; weights go to <run_dir>/stages, checkpoints to <run_dir>/checkpoints.
        model_config: NetworkConfig as JSON.
        training: TrainingConfig as JSON.
        seed: Seed of the initialisation.
        previous: sha256 of the previous stage's weights, or of nothing for the first.
        code_version: Hash of the code.
        model: The stage's weights.
        curve: Loss and validation curve.
        metrics: Best score and step.

    Returns:
        sha256 of the weights.
    """
    import json
    import shutil
    from pathlib import Path

    from pydantic import TypeAdapter

    from model.ega_v1.network import NetworkConfig
    from model.evaluation.plots import curve_page
    from model.training.run import train_stage as train
    from model.training.stages import TrainingConfig

    run, parse = Path(run_dir), lambda kind, text: TypeAdapter(kind).validate_json(text)
    files = train(stage, Path(samples), parse(NetworkConfig, model_config), parse(TrainingConfig, training), run / "stages", run / "checkpoints", seed)
    shutil.copyfile(files.weights, model.path)
    model.metadata.update({"sha256": files.result["sha256"], "previous": previous, "code_version": code_version})
    Path(curve.path).write_text(curve_page(files.result))
    summary = {name: files.result[name] for name in ("best_step", "best_score", "steps")}
    for name, value in summary.items():
        metrics.log_metric(name, value)
    Path(metrics.path).write_text(json.dumps(summary))
    return files.result["sha256"]
