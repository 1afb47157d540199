"""The other end of a run: nothing reaches the model store."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def reject_candidate(reason: str) -> str:
    """Say why the candidate was rejected; the run ends normally.

    Args:
        reason: The gates' verdict in words.

    Returns:
        The verdict.
    """
    return f"rejected: {reason}"
