"""The monitoring pipeline: raw traffic to a report, and to the logs of the next training where the alarms call for one.

Meant to recur (docs/experiments.md): the join takes new days only. Compiled to monitor_experiment.yaml beside this file.
"""

from kfp import dsl

from components.join_events.component import join_events
from components.judge_experiment.component import judge_experiment
from components.keep_model.component import keep_model
from components.merge_logs.component import merge_logs
from pipelines.train_and_approve import place


@dsl.pipeline(name="monitor-experiment", description="Join events, compare arms, measure drift; prepare a training where the alarms call for one.")
def monitor_experiment(traffic: str, reference: str, out: str, workspace: str, window_hours: float, config: str, title: str, code_version: str) -> str:
    """From raw traffic to a report.

    Args:
        traffic: Folder with requests, impressions and raw events, or of clean logs.
        reference: Logs of the period before.
        out: Folder of the report and of the joined logs.
        workspace: Evidently workspace that gets the snapshot; empty for none.
        window_hours: Attribution window.
        config: MonitorConfig as JSON.
        title: First line of the report.
        code_version: Hash of the code.

    Returns:
        "retrain: FOLDER: reasons" or "keep: severity: verdict".
    """
    joined = place(join_events(traffic=traffic, store=f"{out}/logs", window_hours=window_hours, code_version=code_version), "2", "8G")
    # The traffic grows under one name, so no answer is ever taken from the cache.
    joined.set_caching_options(False)
    judged = place(
        judge_experiment(logs=joined.outputs["Output"], reference=reference, out=out, workspace=workspace, config=config, title=title, code_version=code_version), "2", "16G"
    )
    judged.set_caching_options(False)
    with dsl.If(judged.outputs["Output"] == True, name="alarm"):  # noqa: E712 - KFP compiles the comparison
        merged = place(merge_logs(reference=reference, logs=joined.outputs["Output"], out=out, summary=judged.outputs["summary"], code_version=code_version), "1", "8G")
        merged.set_caching_options(False)
    with dsl.Else():
        kept = keep_model(summary=judged.outputs["summary"])
    return dsl.OneOf(merged.output, kept.output)
