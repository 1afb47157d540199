"""The command-line edges of `ega ab` and `ega monitor`: exit codes, clear errors, nothing lost."""

from __future__ import annotations

from cli import ab, monitor
from monitoring.experiment import DriverConfig
from monitoring.report import MonitorConfig


def test_monitor_wants_exactly_one_source(tmp_path, capsys):
    assert monitor.monitor() == 2
    assert monitor.monitor(run=tmp_path, traffic=tmp_path) == 2
    assert "either a run folder" in capsys.readouterr().err


def test_monitor_without_traffic_says_who_writes_it(tmp_path, capsys):
    assert monitor.monitor(run=tmp_path) == 1
    assert "`ega ab` writes it" in capsys.readouterr().err


def test_ab_needs_a_run_with_simulated_users(tmp_path, capsys):
    assert ab.ab(ab.Experiment(tmp_path, tmp_path / "home", MonitorConfig(), DriverConfig(), progress=False)) == 1
    assert "simulated users" in capsys.readouterr().err


def test_an_earlier_event_log_is_kept_aside_not_overwritten(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "events").mkdir()
        (tmp_path / "events" / "events.db").write_text(content)
        ab._set_aside(tmp_path)
    assert not (tmp_path / "events").exists()
    assert [(tmp_path / f"events-{n}" / "events.db").read_text() for n in (1, 2)] == ["first", "second"]
    ab._set_aside(tmp_path)
