"""Prometheus metrics of the service, beside those that BentoML keeps itself; all on /metrics, prefix `ega_`.

deploy/grafana/ega.json draws them. The HTTP worker and the ranking process write theirs to the files that BentoML names; a scrape adds them up.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.multiprocess import mark_process_dead

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

PAGES = Counter("ega_pages_total", "Pages answered.", ["arm", "model_version"])
DEGRADED = Counter("ega_degraded_total", "Pages answered with this reason in `degraded`.", ["reason"])
PRICE_FALLBACKS = Counter("ega_price_fallback_total", "Pages whose auction invariants failed and that fell back to GSP; alarm at 1.", ["invariant"])
EVENTS = Counter("ega_events_total", "Events received, by type and outcome: accepted, duplicate, unknown_impression, ad_mismatch.", ["type", "outcome"])
PUSHED = Counter("ega_events_pushed_total", "Clicks (on organic results too) and purchases written to the online feature store.")
UNPUSHED = Gauge("ega_events_unpushed", "Clicks (on organic results too) and purchases (at most 1,000 are counted) that the online feature store does not have yet.", multiprocess_mode="livemax")
REFUSED = Counter("ega_refused_total", "Requests refused, by error code of the gate or status of the app.", ["code"])
ADMITTED = Gauge("ega_admitted", "Requests admitted and not yet answered.", multiprocess_mode="livesum")
QUEUED = Gauge("ega_queued", "Requests waiting to be admitted.", multiprocess_mode="livesum")
QUEUE_SECONDS = Histogram("ega_queue_seconds", "Wait of an admitted request for its slot.", buckets=_SECONDS)
REQUEST_SECONDS = Histogram("ega_request_seconds", "Time from the complete body to the end of the answer.", ["path", "status"], buckets=_SECONDS)
STAGE_SECONDS = Histogram("ega_stage_seconds", "Time of a part of a ranked page.", ["stage"], buckets=_SECONDS)
CIRCUIT_OPEN = Gauge("ega_user_features_circuit_open", "1 while the feature store is left alone after failures.", multiprocess_mode="livemax")
STALE_AGE_SECONDS = Histogram("ega_user_features_stale_age_seconds", "Age of cached user features when they replaced fresh ones.", buckets=(1, 5, 15, 60, 300, 900, 3600))
MODEL_LIVE = Gauge("ega_model_live", "1 for the model version that serves a place: an arm's name, or 'shadow'.", ["place", "model_version"], multiprocess_mode="livemax")
MODEL_SWAPS = Counter("ega_model_swaps_total", "Changes of the live model, by outcome: activated, refused.", ["outcome"])
SHADOW_PAGES = Counter("ega_shadow_pages_total", "Pages for the shadow model, by outcome: ranked, failed, dropped (busy).", ["model_version", "outcome"])
SHADOW_OVERLAP = Histogram("ega_shadow_overlap", "Share of the shadow page's ads that the answered page shows too.", buckets=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
READY = Gauge("ega_ready", "1 while the service takes traffic; 0 before it is warm and while it drains.", multiprocess_mode="livemax")


def forget_dead_workers() -> None:
    """Drop the gauges that a killed worker left behind; without this its last values are served for ever."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for file in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            mark_process_dead(pid, folder)
