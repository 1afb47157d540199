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
    import hashlib
    import json
    from pathlib import Path

    from marketplace.logs import data_hash
    from monitoring.retraining import merge_logs as merge

    found = json.loads(summary)
    identity = hashlib.sha256((data_hash(Path(reference)) + data_hash(Path(logs))).encode()).hexdigest()[:12]
    folder = Path(out).parent / f"retrain-{identity}"
    if not folder.exists():
        merge(Path(reference), Path(logs), folder)
    return f"retrain: {folder}: {', '.join(found['retraining'])}"
