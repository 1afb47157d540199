"""Feature snapshots, feast apply, materialise."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_features(logs: str, home: str, behaviours: int, fresh: bool, data_hash: str, code_version: str, snapshot: Output[Dataset]) -> str:
    """Write the offline sources, apply the definitions and fill the online store.

    Args:
        logs: Folder of validated logs.
        home: State of the configuration; the Feast store lies in <home>/feast.
        behaviours: L, behaviours kept per user.
        fresh: Start from an empty store, forgetting live events newer than the logs: for simulated runs.
        data_hash: Hash of the validated data.
        code_version: Hash of the code.
        snapshot: What was built.

    Returns:
        The time up to which features are known.
    """
    import dataclasses
    import json
    from pathlib import Path

    from features.build import build_features as build

    built = build(Path(logs), Path(home), behaviours, fresh=fresh)
    if built.data_hash != data_hash:
        raise ValueError(f"the logs changed after validation: {built.data_hash} is not {data_hash}; run again")
    Path(snapshot.path).write_text(json.dumps(dataclasses.asdict(built)))
    snapshot.metadata.update({"data_hash": data_hash, "code_version": code_version})
    return built.as_of
