"""Put an approved bundle into the model store; checks the signed record itself."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def approve_model(run_dir: str, home: str, code_version: str) -> str:
    """Approve <run_dir>/bundle by <run_dir>/gate.json, whatever the control flow said.

    Args:
        run_dir: Folder of the run.
        home: State of the configuration; the BentoML model store lies in <home>/bentoml.
        code_version: Hash of the code.

    Returns:
        Exact tag of the approved model.
    """
    from pathlib import Path

    from model.bundle import signing_key
    from serving.store import approve_bundle

    print(f"approving with code {code_version}")
    return approve_bundle(Path(run_dir) / "bundle", Path(run_dir) / "gate.json", Path(home), signing_key(Path(home).parent))
