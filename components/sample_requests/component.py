"""Point-in-time features joined with popularity-sampled candidates."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sample_requests(logs: str, home: str, run_dir: str, config: str, seed: int, as_of: str, code_version: str, samples: Output[Dataset]) -> str:
    """Write memory-mapped request samples to <run_dir>/samples.

    Args:
        logs: Folder of validated logs.
        home: State of the configuration, with the Feast store.
        run_dir: Folder of the run.
        config: SamplingConfig as JSON.
        seed: Seed of the draws.
        as_of: Time of the feature snapshot; ties this step to it.
        code_version: Hash of the code.
        samples: Counts of what was sampled.

    Returns:
        The sample folder.
    """
    import shutil
    from pathlib import Path

    from pydantic import TypeAdapter

    from features.sampling import SamplingConfig
    from features.sampling import sample_requests as sample

    out = Path(run_dir) / "samples"
    sample(Path(logs), Path(home), out, TypeAdapter(SamplingConfig).validate_json(config), seed)
    shutil.copyfile(out / "samples.json", samples.path)
    samples.metadata.update({"as_of": as_of, "code_version": code_version, "folder": str(out)})
    return str(out)
