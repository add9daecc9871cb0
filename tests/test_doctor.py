"""Measuring the machine, as its users meet it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from conftest import Daemon, counted


def test_doctor_measures_and_explain_knows_what_is_possible(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = make_daemon()
    path = make_file({"w": counted((8, 6))})
    daemon.ask("load", str(path), "--wait")
    folder = tmp_path / "disk"
    folder.mkdir()
    assert daemon.ask("explain", "last")["rates_known"] is False
    report = daemon.ask("doctor", str(folder))
    stored = daemon.state_folder / "machine.json"
    assert list(folder.iterdir()) == [] and report["saved"] == str(stored)
    assert report["bytes_per_s"]["memcpy_1"] > 0 and report["bytes_per_s"]["cache_pread"] > 0
    assert {check["verdict"] for check in report["checks"]} <= {"good", "could be better", "missing"}
    assert all((check["verdict"] == "good") == (check["advice"] == "") for check in report["checks"])
    assert {"io_uring", "huge pages, MADV_COLLAPSE", "RLIMIT_NOFILE", "/dev/shm"} <= {
        check["name"] for check in report["checks"]
    }
    explained = daemon.ask("explain", "last")
    assert explained["rates_known"] is True and explained["possible_gb_per_s"] > 0
    assert "GB/s that are possible here (page cache)" in daemon.run("explain", "last").stdout
    daemon.stop()
    daemon.start()  # reads by them
    daemon.ask("load", str(path), "--wait")
    assert daemon.ask("explain", "last")["cached_bytes"] >= 8 * 6 * 4
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "machine": "another"}))
    assert daemon.ask("explain", "last")["rates_known"] is False


def test_doctor_stores_what_it_measured_without_a_daemon(
    binary: Path, short_folder: Path, tmp_path: Path
) -> None:
    nobody = Daemon(binary, short_folder / "nobody")
    done = nobody.run("doctor", str(tmp_path))
    assert done.returncode == 0, done.stderr
    stored = json.loads((nobody.state_folder / "machine.json").read_text())
    assert stored["machine"] == done.stdout.splitlines()[0]
    assert stored["bytes_per_s"]["memcpy_all"] > 0
    assert str(nobody.state_folder / "machine.json") in done.stdout
    assert nobody.run("doctor", str(tmp_path / "none")).returncode == 1
    assert nobody.run("doctor", "--loud").returncode == 2
