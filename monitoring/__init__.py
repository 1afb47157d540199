"""Events to facts, A/B statistics, drift, reports."""
