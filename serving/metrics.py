"""Prometheus metrics of the service, beside those that BentoML keeps itself; all on /metrics, prefix `ega_`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

PAGES = Counter("ega_pages_total", "Pages answered.", ["arm", "model_version"])
DEGRADED = Counter("ega_degraded_total", "Pages answered with this reason in `degraded`.", ["reason"])
PRICE_FALLBACKS = Counter("ega_price_fallback_total", "Pages whose auction invariants failed and that fell back to GSP; alarm at 1.", ["invariant"])
EVENTS = Counter("ega_events_total", "Events received, by type and outcome: accepted, duplicate, unknown_impression, ad_mismatch.", ["type", "outcome"])
REFUSED = Counter("ega_refused_total", "Requests refused, by error code of the gate or status of the app.", ["code"])
ADMITTED = Gauge("ega_admitted", "Requests admitted and not yet answered.", multiprocess_mode="livesum")
STAGE_SECONDS = Histogram(
    "ega_stage_seconds",
    "Time of a part of a ranked page.",
    ["stage"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
