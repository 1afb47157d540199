"""Named runs: every YAML in config/ parses, survives writing out, and a mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import ConfigError, as_yaml, load_run_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "config").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_named_run_parses_and_is_called_like_its_file(path, tmp_path):
    config = load_run_config(path)
    assert config.name == path.stem
    (tmp_path / "resolved.yaml").write_text(as_yaml(config))
    assert load_run_config(tmp_path / "resolved.yaml") == config


def test_the_papers_run_has_the_papers_sizes():
    """Sec. 5.1 and Appendix A.1, as `ega bench flops` counts them."""
    from benchmarks.flops import PAPER

    config = load_run_config(CONFIGS[0].parent / "paper.yaml")
    assert {name: getattr(config.model, name) for name in PAPER} == PAPER
    assert (config.model.feed_forward, config.model.slots, config.features.behaviours, config.sampling.unexposed) == (4, 5, 1000, 2995)
    assert config.world.synthetic.ads_per_city == 100_000
    assert (config.training.pretrain.learning_rate, config.training.pretrain.batch) == (1e-3, 128)


@pytest.mark.parametrize(("text", "named"), [
    ("name: a\nsampling: {unexposd: 3}", "sampling.unexposd"),
    ("name: a\nlearning_rate: 1", "learning_rate"),
    ("name: a\ntraining: {pretrain: {steps: many}}", "training.pretrain.steps"),
    ("name: a\nfeatures: {behaviours: 0}", "features.behaviours"),
    ("seed: 1", "name"),
    ("name: a\nworld: {kind: sythetic}", "world.kind"),
    ("- a", "mapping"),
    ("name: [", "not valid YAML"),
])  # fmt: skip
def test_a_mistake_is_named(text, named, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_run_config(path)
    assert named in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no run configuration at"):
        load_run_config(tmp_path / "quickstart.yaml")


def test_seed_from_the_command_line_replaces_the_files():
    assert load_run_config(CONFIGS[0], seed=123).seed == 123
    assert load_run_config(CONFIGS[0], seed=None).seed == load_run_config(CONFIGS[0]).seed
