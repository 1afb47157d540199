"""Replay, gates, bundle and signed verdict. Returns a bool that our code made; nothing else decides."""

from kfp import dsl
from kfp.dsl import HTML, ClassificationMetrics, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_candidate(
    samples: str,
    logs: str,
    run_dir: str,
    home: str,
    config: str,
    seed: int,
    weights: str,
    code_version: str,
    reason: dsl.OutputPath(str),
    report: Output[HTML],
    metrics: Output[Metrics],
    roc: Output[ClassificationMetrics],
) -> bool:
    """Judge the candidate on the test days and write its bundle and the signed gate record.

    Args:
        samples: Sample folder.
        logs: Folder of validated logs, for the counting baselines.
        run_dir: Folder of the run; writes <run_dir>/evaluation, <run_dir>/bundle and <run_dir>/gate.json.
        home: State of the configuration; its newest approved model is the incumbent.
        config: CandidateConfig as JSON: model, training, evaluation and gates.
        seed: Seed of the initialisation.
        weights: sha256 of the final stage's weights.
        code_version: Hash of the code.
        reason: Verdict in words.
        report: Gate table, calibration, ROC and prices.
        metrics: AUC, Recall, Dev, eCTR, eRPM, psi.
        roc: ROC of the served pCTR on exposed test ads.

    Returns:
        True when every gate approved.
    """
    import json
    from pathlib import Path

    from components.candidate import candidate_page, flat_metrics, judge_candidate, roc_points

    verdict = judge_candidate(Path(samples), Path(logs), Path(run_dir), Path(home), config, seed, weights, code_version)
    Path(reason).write_text(verdict["reason"])
    Path(report.path).write_text(candidate_page(Path(run_dir)))
    flat = flat_metrics(verdict)
    for name, value in flat.items():
        metrics.log_metric(name, value)
    Path(metrics.path).write_text(json.dumps(flat))
    roc.log_roc_curve(*roc_points(Path(run_dir)))
    Path(roc.path).write_text(json.dumps({"file": "ROC is in the artifact's metadata"}))
    return verdict["approved"] is True
