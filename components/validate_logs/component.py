"""Stop the pipeline before anything is trained on logs that break a rule."""

from kfp import dsl
from kfp.dsl import HTML, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate_logs(logs: str, run_dir: str, home: str, config: str, code_version: str, report: Output[HTML], metrics: Output[Metrics]) -> str:
    """Validate a folder of logs; critical failures raise with rule, rows and examples.

    Args:
        logs: Folder of logs in the schema of marketplace.schema.
        run_dir: Folder of the run; writes <run_dir>/validation.
        home: State of the configuration; the last accepted data's figures lie in <home>/accepted.
        config: ValidationConfig as JSON.
        code_version: Hash of the code, so that a changed package is a cache miss.
        report: Data docs, one HTML page.
        metrics: Number of rules checked and failures.

    Returns:
        Hash of the validated data.
    """
    import json
    from pathlib import Path

    from pydantic import TypeAdapter

    from marketplace.validation import ValidationConfig, accept, validation_text
    from marketplace.validation import validate_logs as validate

    result = validate(Path(logs), Path(run_dir) / "validation", TypeAdapter(ValidationConfig).validate_json(config), Path(home) / "accepted")
    Path(report.path).write_bytes(result.html.read_bytes())
    metrics.log_metric("rules", result.laws)
    metrics.log_metric("failures", len(result.failures))
    Path(metrics.path).write_text(json.dumps({"rules": result.laws, "failures": len(result.failures), "code": code_version}))
    print(validation_text(result))
    if not result.passed:
        raise ValueError(validation_text(result))
    accept(result, Path(home) / "accepted")
    return str(result.statistics["data_hash"])
