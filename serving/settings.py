"""How the ranking service is configured: one JSON file, named by the environment variable EGA_SERVING.

The bearer tokens are secrets and therefore never in that file: they come from EGA_SERVING_TOKEN and EGA_ADMIN_TOKEN.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from marketplace.schema import REQUESTS

SETTINGS_VARIABLE = "EGA_SERVING"
TOKEN_VARIABLE = "EGA_SERVING_TOKEN"  # noqa: S105 - the name of a variable, not a secret
ADMIN_TOKEN_VARIABLE = "EGA_ADMIN_TOKEN"  # noqa: S105

STARTUP_ERROR_VARIABLE = "EGA_SERVING_STARTUP_ERROR"
"""Names a file in which a worker that cannot start says why; set by serving.launch."""

PriceMode = Literal["critical", "learned", "implicit", "gsp", "vcg", "first_price"]

_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class SettingsError(ValueError):
    """The service cannot start with these settings; the text says what to change."""


@dataclass(frozen=True, config=_CONFIG)
class Arm:
    """One arm of the experiment that the service runs."""

    name: str
    """Name in answers and logs, e.g. 'control'."""
    policy: Literal["model", "bootstrap"]
    """'model': the approved bundle; 'bootstrap': distance + popularity recall with GSP prices, the logging policy."""
    share: float = 1.0
    """Share of the users, relative to the sum over all arms; 0 keeps the arm loaded without traffic."""
    model: str = ""
    """Exact tag of a model of this arm's own; empty: the place `live`. `ega models activate --place arm:NAME` overrides it."""

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if not self.name or not self.name.replace("_", "").replace("-", "").replace(".", "").isalnum() or len(self.name) > 64:
            raise ValueError(f"arm name {self.name!r}: 1 to 64 letters, digits, '_', '-' or '.'")
        if not 0.0 <= self.share < float("inf"):
            raise ValueError(f"arm {self.name}: share must be finite and >= 0, got {self.share}")
        if self.model and self.policy != "model":
            raise ValueError(f"arm {self.name}: only an arm with policy 'model' can name a model")
        return self


@dataclass(frozen=True, config=_CONFIG)
class ServingConfig:
    """Everything the service needs besides the token."""

    home: Path
    """State of one named configuration: holds feast/, bentoml/ and events/."""
    signing_home: Path | None = None
    """Folder of signing.key (EGA_HOME); default: the parent of `home`. EGA_SIGNING_KEY overrides the file."""
    model_tag: str = ""
    """Exact tag in the BentoML store, e.g. 'ega-v1:0123456789ab', pinned against `ega models activate`; empty: the newest decision."""
    arms: tuple[Arm, ...] = (Arm(name="none", policy="model"),)
    """Experiment arms; one arm means no experiment. Schema: 'none' is the arm outside experiments."""
    shadow_share: float = 1.0
    """Share of the pages, in [0, 1], that the model in the place `shadow` ranks too, in the background; pages that find it busy are left out."""
    salt: str = "ega"
    """Experiment salt of the assignment hash; a new salt reshuffles the users."""
    price_mode: PriceMode | Literal["auto"] = "auto"
    """Price rule of the model arm; 'auto': what the gates chose, 'learned' if the payment network passed its own, else 'critical' (EGA (V2): 'implicit')."""
    quality_floor: float = 0.0
    """Least set-aware pCTR, in [0, 1), with which the model arm shows an ad; a filter on predicted clicks, never on bids."""
    alpha_limits: tuple[float, float] = (0.0, 10.0)
    """Least and greatest `alpha` that a request may ask of EGA (V2): the exponent of bids in its search."""
    beta_limits: tuple[float, float] = (0.01, 10.0)
    """The same of `beta`, the weight of what bids nothing."""
    budgets: Path | None = None
    """CSV file (ad_id, daily_budget in currency); ads not in it have no budget. Read once at start."""
    pacing_interval_seconds: float = 60.0
    """Time between two looks at what was spent today, on the clock of the requests' timestamps."""
    currency_step: float = 0.0001
    """Smallest unit of money; charges are rounded down to it. 0: not rounded."""
    catalogue_seconds: float = 2.0
    """Time between two looks at the catalogue's file; new ads and bids are shown that much later, plus what preparing the models takes."""
    default_slots: int = 5
    """K, ads on a page when the request names none."""
    max_candidates: int = 200_000
    """Most ids in `candidates`, `exclude` or `bids` of one request."""
    max_events: int = 10_000
    """Most events in one call of /v1/events."""
    body_limit_bytes: int = 4 * 1024 * 1024
    """Longest accepted body, bytes; 200,000 ids of 19 digits fit."""
    body_budget_bytes: int = 64 * 1024 * 1024
    """Bodies held in memory at once over all connections, bytes; beyond: 429."""
    body_deadline_seconds: float = 2.0
    """Time a client has to send its body; beyond: 408."""
    admission_limit: int = 2
    """Requests in work at once; there are two threads for them."""
    queue_ms: float = 100.0
    """Longest wait for admission that is expected of a request of a burst, milliseconds; beyond, and beyond one a slot: 429 with Retry-After."""
    queue_calm_ms: float = 400.0
    """Once one was refused it is no burst but overload: nobody waits until no request was refused for this long, milliseconds, or few of the newest were."""
    feature_deadline_ms: float = 50.0
    """Longest wait for the user's features, milliseconds; beyond: the last known ones or the default user, answer marked degraded."""
    feature_failures: int = 5
    """Failed or late reads in a row after which the feature store is left alone."""
    feature_cooldown_seconds: float = 1.0
    """Time between two trial reads while it is left alone."""
    feature_cache_users: int = 5_000
    """Users whose last features are kept for when the store fails; about 50 bytes a behaviour each."""
    feature_cache_seconds: float = 3_600.0
    """Oldest features that may replace fresh ones."""
    push_events: bool = True
    """Write accepted clicks, on organic results too, and purchases to the online feature store, so that the user's next request sees them."""
    push_wait_ms: float = 200.0
    """Longest wait of /v1/events for that write; later ones follow by themselves."""
    drain_seconds: float = 1.0
    """On SIGTERM: time between /readyz turning 503 and the end of the listening socket. At least the probe interval of what sends traffic."""
    admin_host: str = "127.0.0.1"
    """Address of the admin port; any but a loopback address needs EGA_ADMIN_TOKEN."""
    admin_port: int = 0
    """Port for model operations (`ega models`); 0: none."""
    log_format: Literal["json", "text"] = "json"
    """Lines of the service's log: one JSON object each, or plain text."""
    events_synchronous: Literal["full", "normal"] = "full"
    """SQLite `synchronous` of the event log. full: an answered page survives power loss; normal: it survives kill -9, not power loss."""
    torch_threads: int = 1
    """Threads of the model's arithmetic; more than the idle cores make answers slower, not faster."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model's matrix products over a city; auto: bfloat16 where the hardware multiplies it, else float32."""
    bootstrap_epsilon: float = 0.1
    """Exploration share of the bootstrap arm, in [0, 1); propensities are logged exactly."""
    seed: int = 0
    """Seed of the bootstrap arm's exploration; combined with the request id."""

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if not arms:
            raise ValueError("arms must hold at least one arm")
        names = [arm.name for arm in arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arm names must be unique, got {', '.join(names)}")
        if sum(arm.share for arm in arms) <= 0:
            raise ValueError("the shares of the arms must not all be 0")
        return arms

    @model_validator(mode="after")
    def _limits(self) -> ServingConfig:
        most_slots = int(REQUESTS["slots"].maximum or 0)
        if not 1 <= self.default_slots <= most_slots:
            raise ValueError(f"default_slots must be 1 to {most_slots}, got {self.default_slots}")
        for name in (
            "max_candidates",
            "max_events",
            "body_limit_bytes",
            "body_budget_bytes",
            "body_deadline_seconds",
            "admission_limit",
            "queue_calm_ms",
            "feature_deadline_ms",
            "feature_failures",
            "feature_cooldown_seconds",
            "feature_cache_users",
            "feature_cache_seconds",
            "torch_threads",
            "catalogue_seconds",
            "pacing_interval_seconds",
        ):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        for name in ("queue_ms", "push_wait_ms", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if not 0 <= self.admin_port < 65_536:
            raise ValueError(f"admin_port must be 0 to 65535, got {self.admin_port}")
        if not 0.0 <= self.shadow_share <= 1.0:
            raise ValueError(f"shadow_share must be in [0, 1], got {self.shadow_share}")
        if self.body_budget_bytes < self.body_limit_bytes:
            raise ValueError("body_budget_bytes must be at least body_limit_bytes")
        if not 0.0 <= self.currency_step < float("inf"):
            raise ValueError(f"currency_step must be finite and >= 0, got {self.currency_step}")
        if not 0.0 <= self.quality_floor < 1.0:
            raise ValueError(f"quality_floor must be in [0, 1), got {self.quality_floor}")
        for name, floor in (("alpha_limits", 0.0), ("beta_limits", 1e-6)):
            low, high = getattr(self, name)
            if not floor <= low <= high < float("inf"):
                raise ValueError(f"{name} must be finite, ascending and at least {floor:g}, got {low} to {high}")
        if not 0.0 <= self.bootstrap_epsilon < 1.0:
            raise ValueError(f"bootstrap_epsilon must be in [0, 1), got {self.bootstrap_epsilon}")
        return self

    @property
    def key_home(self) -> Path:
        return self.signing_home or self.home.parent

    @property
    def event_log(self) -> Path:
        return event_log_path(self.home)


def event_log_path(home: Path) -> Path:
    """Where the live event log of a home lies."""
    return home / "events" / "events.db"


_ADAPTER = TypeAdapter(ServingConfig)


def load_settings(path: Path | None = None, home: Path | None = None) -> ServingConfig:
    """Read the settings file: `path`, or the one that EGA_SERVING names. `home`: for a file that does not name it.

    A relative `budgets` lies beside the settings file: the worker that reads it runs in another folder.
    """
    named = path or os.environ.get(SETTINGS_VARIABLE)
    if not named:
        raise SettingsError(f"{SETTINGS_VARIABLE} is not set: it must name the JSON settings file; `ega serve` writes one and sets it")
    try:
        found = json.loads(Path(named).read_bytes()) if home is not None else None
        if isinstance(found, dict):
            config = _ADAPTER.validate_json(json.dumps({**found, "home": str(home)}))
            return replace(config, budgets=config.budgets and (Path(named).parent / config.budgets).absolute())
        return _ADAPTER.validate_json(Path(named).read_bytes())
    except json.JSONDecodeError as error:
        raise SettingsError(f"serving settings {named} are no JSON: {error}") from error
    except OSError as error:
        raise SettingsError(f"cannot read the serving settings {named}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_context=False, include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        raise SettingsError(f"serving settings {named}, field {where}: {first['msg']}") from error


def save_settings(config: ServingConfig, path: Path) -> Path:
    """Write the settings where a service process will read them; atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(_ADAPTER.dump_json(config, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path
