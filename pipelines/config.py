"""A named run: one YAML file, parsed once into the typed dataclasses that live beside their owners. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from components.candidate import CandidateConfig
from features.sampling import SamplingConfig
from marketplace.validation_rules import ValidationConfig
from marketplace.worlds import WorldConfig
from model.ega_v1.network import NetworkConfig
from model.evaluation.gates import GateConfig
from model.evaluation.replay import EvaluationConfig
from model.training.stages import TrainingConfig
from monitoring.experiment import DriverConfig
from monitoring.report import MonitorConfig

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ConfigError(ValueError):
    """A run's YAML that cannot be used; the text names the field and what would be right."""


@dataclass(frozen=True, config=_STRICT)
class FeatureConfig:
    """Feature snapshots."""

    behaviours: int = Field(64, ge=1, le=1000)
    """L, behaviours kept per user, newest first."""


@dataclass(frozen=True, config=_STRICT)
class ExperimentConfig:
    """The A/B test at the end of a simulated run."""

    enabled: bool = True
    """Serve the approved model and drive it with simulated users."""
    driver: DriverConfig = Field(default_factory=DriverConfig)
    """How users are sent."""
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    """Plan, verdict and drift."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything of a run. Each section belongs to the room that it configures."""

    name: str
    """Name of the configuration; its state lies in EGA_HOME/<name>."""
    seed: int = 7
    """Seed of the world, the sampling and the initialisation."""
    world: WorldConfig | None = None
    """Where logs come from when none are given with --logs; null: logs must be given."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Bounds of the data checks."""
    features: FeatureConfig = Field(default_factory=FeatureConfig)
    """Feature snapshots."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """Request samples."""
    model: NetworkConfig = Field(default_factory=NetworkConfig)
    """Kind, sizes and switches of the model."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """The training stages."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Replay."""
    gates: GateConfig = Field(default_factory=GateConfig)
    """Thresholds."""
    experiment: ExperimentConfig = Field(default_factory=ExperimentConfig)
    """The A/B test."""

    def __post_init__(self) -> None:
        if self.model.kind != "ega_v2" or self.world is None:
            return
        v2, creatives, items = self.model.ega_v2, self.world.creatives, self.world.organic.items
        if creatives.per_ad < 2:
            raise ValueError("model.kind ega_v2 chooses creatives: set world.creatives.per_ad to 2 or more")
        if creatives.width != v2.creative_width:
            raise ValueError(f"world.creatives.width is {creatives.width} and model.ega_v2.creative_width {v2.creative_width}; they must be equal")
        if items > v2.organic_items:
            raise ValueError(f"world.organic.items is {items}, the model reads at most model.ega_v2.organic_items = {v2.organic_items}")

    @property
    def candidate(self) -> CandidateConfig:
        """The sections that judging a candidate needs."""
        return CandidateConfig(self.model, self.training, self.evaluation, self.gates)


def load_run_config(path: Path | str, **changes: Any) -> RunConfig:
    """Parse a YAML file; `changes` replace top-level fields (e.g. seed)."""
    path = Path(path)
    if not path.is_file():
        named = Path(__file__).resolve().parent.parent / "config" / f"{path.stem}.yaml"
        hint = f"; did you mean {named}?" if named.is_file() else ""
        raise ConfigError(f"no run configuration at {path}{hint}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(content).__name__}")
    content |= {name: value for name, value in changes.items() if value is not None}
    try:
        return TypeAdapter(RunConfig).validate_python(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors(include_url=False)]
        raise ConfigError(f"{path} has {len(lines)} mistake(s):\n" + "\n".join(lines)) from error


def as_json(section: Any) -> str:
    """A config dataclass as canonical JSON: what is passed to a component and written beside the run."""
    return json.dumps(TypeAdapter(type(section)).dump_python(section, mode="json"), sort_keys=True)


def as_yaml(config: RunConfig) -> str:
    """The resolved run, every default written out; parses back to the same config."""
    return yaml.safe_dump(json.loads(as_json(config)), sort_keys=False)


def replaced(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy with other top-level fields."""
    return dataclasses.replace(config, **changes)
