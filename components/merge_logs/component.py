"""Reference period and monitored traffic as the logs of the next training."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge_logs(reference: str, logs: str, out: str, summary: str, code_version: str) -> str:
    """Write the logs that a training is to run on.

    Args:
        reference: Logs of the period before.
        logs: Clean logs of the monitored traffic.
        out: Folder of the report; the new logs go beside it, named by their hash.
        summary: What the report found, as JSON.
        code_version: Hash of the code, so that a changed package is a cache miss.

    Returns:
        "retrain: FOLDER: reasons".
    """
    import json
    from pathlib import Path

    from monitoring.retraining import training_logs

    found = json.loads(summary)
    folder = training_logs(Path(reference), Path(logs), Path(out).parent)
    return f"retrain: {folder}: {', '.join(found['retraining'])}"
