"""User-independent ad states of the approved model as a Feast offline view."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish_ad_embeddings(run_dir: str, home: str, tag: str, code_version: str, embeddings: Output[Dataset]) -> str:
    """Publish the ad states of an approved model, tagged by its version.

    Args:
        run_dir: Folder of the run, with samples and bundle.
        home: State of the configuration, with the Feast store.
        tag: Exact tag of the approved model.
        code_version: Hash of the code.
        embeddings: Where they were written.

    Returns:
        The tag.
    """
    from pathlib import Path

    from components.candidate import publish_embeddings

    path, count = publish_embeddings(Path(run_dir), Path(home), tag)
    Path(embeddings.path).write_text(str(path))
    embeddings.metadata.update({"ads": count, "model": tag, "code_version": code_version})
    return tag
