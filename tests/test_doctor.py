"""Measuring the machine, as its users meet it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensord
from conftest import Daemon, counted
from tensord.cli import gpus
from tensord.cli.doctor import MEASUREMENTS, Check, gpu_checks, judge, keep, look_around


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
    assert set(report["bytes_per_s"]) == {one.name for one in MEASUREMENTS}
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
    if report["bytes_per_s"]["cache_mapped"] > 0:
        daemon_takes_the_fastest_way(daemon, stored, make_file)
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "machine": "another"}))
    assert daemon.ask("explain", "last")["rates_known"] is False


def daemon_takes_the_fastest_way(daemon: Daemon, stored: Path, make_file: Callable[..., Path]) -> None:
    values = counted((3000, 700))
    path = make_file({"w": values})
    known = json.loads(stored.read_text())
    for fastest in ("cache_pread", "cache_stream", "cache_mapped"):
        rates = dict.fromkeys(("cache_pread", "cache_stream", "cache_mapped"), 1e9) | {fastest: 2e9}
        stored.write_text(json.dumps({**known, "bytes_per_s": {**known["bytes_per_s"], **rates}}))
        daemon.stop()
        daemon.start()
        with tensord.open(path, "np") as model:
            assert np.array_equal(model["w"], values)
        explained = daemon.ask("explain", "last")
        assert explained["cached_bytes"] >= values.nbytes
        is_mapped = "cached bytes come from a mapping of the file" in explained["notes"]
        assert is_mapped == (fastest == "cache_mapped")
    stored.write_text(json.dumps(known))


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


def test_rates_are_kept_at_once_or_not_at_all(tmp_path: Path) -> None:
    stored = tmp_path / "machine.json"
    report = {"machine": "\udcff", "bytes_per_s": {"memcpy_1": 1.6}, "machine_file": str(stored)}
    assert keep(report) == str(stored) and list(tmp_path.iterdir()) == [stored]
    assert json.loads(stored.read_text()) == {"machine": "?", "bytes_per_s": {"memcpy_1": 2.0}}
    nowhere = tmp_path / "none" / "machine.json"
    with pytest.raises(tensord.NotFoundError, match=f"write {nowhere}: No such file or directory"):
        keep({**report, "machine_file": str(nowhere)})


RATES = {
    **dict.fromkeys(("memcpy_1", "cache_pread", "cache_stream", "cache_mapped"), 5e9),
    **dict.fromkeys(("gather_all", "fresh_huge"), 8e9),
    "memcpy_all": 10e9,
    "fresh_4k": 6e9,
    "disk_direct": 3e9,
    "disk_buffered": 1e9,
}


def told(checks: list[Check]) -> str:
    """What could be better."""
    assert all((check.verdict == "good") == (check.advice == "") for check in checks)
    return "".join(
        f"{check.name}{': missing' if check.verdict == 'missing' else ''}\n"
        for check in checks
        if check.verdict != "good"
    )


def test_every_rate_has_a_verdict_and_says_what_to_do_unless_it_is_good() -> None:
    assert told(judge(RATES)) == ""
    assert [check.value for check in judge(RATES)[:2]] == ["5.00 GB/s", "10.00 GB/s"]
    assert {one.name for one in MEASUREMENTS} == set(RATES)
    poor = {**RATES, "fresh_4k": 1e9, "disk_direct": 0.5e9, "fresh_huge": 0.0}
    assert told(judge(poor)) == (
        "fresh memory, 4 KiB pages\nfresh memory, huge pages: missing\ndisk, O_DIRECT\n"
    )


def test_the_doctor_looks_at_what_the_system_allows() -> None:
    works = {"io_uring": "", "memfd": "", "huge_pages": ""}
    checks = look_around(works, None)
    told(checks)
    assert [check.name for check in checks] == [
        *("io_uring", "memfd and its seals", "huge pages, MADV_COLLAPSE", "huge pages, MFD_HUGETLB"),
        *("RLIMIT_MEMLOCK", "RLIMIT_NOFILE", "cgroup memory.max", "seccomp", "/dev/shm"),
    ]
    assert all(check.value for check in checks)
    assert checks[6].value == "no limit"
    refused = look_around({**works, "io_uring": "it is disabled"}, 64 << 20)
    assert told(refused).startswith("io_uring: missing\n") and refused[0].value == "it is disabled"
    assert refused[6].value == "64.00 MiB"


def test_what_cannot_be_measured_is_an_error_document(binary: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TENSORD_STATE_DIR": str(tmp_path / "state")}
    words = [binary, "measure", str(tmp_path / "none")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["error"]["code"] == "not_found"
    done = subprocess.run([binary, "measure", "a", "b"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""


def test_gpus_are_one_line_where_no_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libcuda.so.of.nobody")
    (only,) = gpu_checks()
    assert only.name == "GPUs" and only.value.startswith("no driver") and only.verdict == "good"


def test_a_driver_that_lacks_functions_gets_a_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libc.so.6")  # a library without any of them
    (only,) = gpu_checks()
    assert "cuInit" in only.value and only.verdict == "could be better" and only.advice
