"""Raw traffic to clean logs: each record once, outcomes joined, days that changed only."""

from kfp import dsl
from kfp.dsl import Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def join_events(traffic: str, store: str, window_hours: float, code_version: str, metrics: Output[Metrics]) -> str:
    """Bring the store of joined traffic up to date; a folder that is joined already is passed on.

    Args:
        traffic: Folder with requests, impressions and raw events; without events it is a folder of clean logs.
        store: Folder of the joined logs, in the schema of the training logs.
        window_hours: Attribution window of clicks and purchases.
        code_version: Hash of the code, so that a changed package is a cache miss.
        metrics: What was counted, kept and left out.

    Returns:
        Folder of clean logs.
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    from monitoring.store import update

    counts = {"joined_already": 1}
    joined = traffic
    if (Path(traffic) / "events").is_dir():
        counts, joined = asdict(update(Path(traffic), Path(store), window_hours).counts), store
    for name, value in counts.items():
        metrics.log_metric(name, value)
    Path(metrics.path).write_text(json.dumps(counts))
    print(f"logs: {joined}")
    return joined
