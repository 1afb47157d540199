"""The command-line edges of `ega ab` and `ega monitor`: exit codes, clear errors, nothing lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import monitoring_traffic
import pytest

from cli import ab, monitor
from marketplace import logs
from monitoring.experiment import DriverConfig
from monitoring.report import MonitorConfig
from serving.settings import SETTINGS_VARIABLE


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


def test_monitor_names_what_it_was_given_and_what_it_wants(tmp_path, capsys):
    assert monitor.monitor(traffic=tmp_path / "nothing") == 1
    assert "docs/data.md" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert monitor.monitor(traffic=tmp_path) == 1
    assert f"`ega ab CONFIG --run {tmp_path.name}` makes one" in capsys.readouterr().err


def test_a_full_disk_is_named_and_leaves_no_part_behind(tmp_path, monkeypatch, capsys):
    monitoring_traffic.write(tmp_path / "live", monitoring_traffic.traffic(1, days=1, users=200, arms={"control": 0.5, "ega": 0.5}))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logs.os, "fsync", full)
    assert monitor.monitor(traffic=tmp_path / "live", out=tmp_path / "out") == 1
    assert f"make room for {tmp_path / 'out'} and run it again" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*")) and not (tmp_path / "out" / "ab_result.json").exists()


def test_an_event_log_that_a_service_writes_is_not_moved(tmp_path):
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "events.db").write_text("live")
    environment = os.environ | {SETTINGS_VARIABLE: str(tmp_path / "serving" / "settings-3000.json")}
    running = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(running, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as service:
        try:
            # The system shows an empty environment for a moment while a process starts, so wait until it runs.
            assert service.stdout is not None and service.stdout.readline() == b"up\n"
            with pytest.raises(ab.AbError, match=f"process {service.pid}"):
                ab._set_aside(tmp_path)
        finally:
            service.kill()
    assert (tmp_path / "events" / "events.db").exists()
