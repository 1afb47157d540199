"""A/B statistics, drift and the report on clean logs; whether a training is called for."""


from kfp import dsl
from kfp.dsl import HTML, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge_experiment(
    logs: str, reference: str, out: str, workspace: str, config: str, title: str, code_version: str, summary: dsl.OutputPath(str), report: Output[HTML], metrics: Output[Metrics]
) -> bool:
    """Write the report of a period of traffic.

    Args:
        logs: Clean logs with arms.
        reference: Logs of the period before.
        out: Folder of the report.
        workspace: Evidently workspace that gets the snapshot; empty for none.
        config: MonitorConfig as JSON.
        title: First line of the report.
        code_version: Hash of the code, so that a changed package is a cache miss.
        summary: Verdict, alarms and what a training could answer, as JSON.
        report: The report, one HTML page.
        metrics: Lifts in per cent, alarms, severity as an exit code.

    Returns:
        True where drift or calibration call for a training on the new traffic.
    """
    import json
    from pathlib import Path

    from pydantic import TypeAdapter

    from monitoring.report import MonitorConfig, monitor

    result = monitor(Path(logs), Path(out), TypeAdapter(MonitorConfig).validate_json(config), Path(reference), None, title, Path(workspace) if workspace else None)
    Path(report.path).write_bytes(result.report.read_bytes())
    numbers = {f"lift_{name}_percent": 100 * record["lift"] for name, record in result.analysis.result["lifts"].items() if record["lift"] == record["lift"]}
    numbers |= {"alarms": len(result.alarms), "severity": result.exit_code}
    for name, value in numbers.items():
        metrics.log_metric(name, value)
    Path(metrics.path).write_text(json.dumps(numbers))
    Path(summary).write_text(json.dumps({"verdict": result.analysis.verdict.headline, "severity": result.severity, "alarms": result.alarms, "retraining": result.retraining}))
    print(result.analysis.verdict.headline, *result.alarms, sep="\n")
    return bool(result.retraining)
