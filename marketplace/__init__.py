"""The market: log schema, worlds that produce logs, click model, readers and validation."""
