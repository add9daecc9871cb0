"""Measuring the machine, as its users meet it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import COMMAND, DEADLINE_SECONDS, Daemon, counted
from processes import until
from tensord.cli import gpus, measuring, sample
from tensord.cli.doctor import (
    CACHED,
    MEASUREMENTS,
    Check,
    gpu_checks,
    judge,
    keep,
    kept_rates,
    look_around,
)
from tensord.cli.sample import sample_of
from tensord.cli.scratch import scratch_daemon
from test_reads import WITHOUT_IO_URING


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
    for fastest in CACHED:
        rates = dict.fromkeys(CACHED, 1e9) | {fastest: 2e9}
        keep({**known, "bytes_per_s": {**known["bytes_per_s"], **rates}, "machine_file": stored})
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
    kept = {"machine": "?", "bytes_per_s": {"memcpy_1": 2.0}, "fastest_cached": ""}
    assert json.loads(stored.read_text()) == kept
    assert kept_rates({"state_dir": str(tmp_path), "machine": "?"}) == {"memcpy_1": 2.0}
    assert kept_rates({"state_dir": str(tmp_path), "machine": "another"}) is None
    for hostile in (
        "",
        "[]",
        "7",
        '{"machine": "?", "bytes_per_s": []}',
        '{"machine": "?", "bytes_per_s": {"a": -1}}',
        '{"machine": "?", "bytes_per_s": {"a": 1e300}}',
        '{"machine": "?", "bytes_per_s": {"a": "b"}}',
    ):
        stored.write_text(hostile)
        assert kept_rates({"state_dir": str(tmp_path), "machine": "?"}) is None, hostile
    stored.unlink()
    assert kept_rates({"state_dir": str(tmp_path), "machine": "?"}) is None
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


# ---- measuring ---------------------------------------------------------------------------------------------

QUICK = measuring.Effort(size_bytes=16 << 20, round_count=1)


@pytest.fixture
def own(binary: Path, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what this process measures has its state, and its private folders for as long as it measures."""
    assert tmp_path.is_dir()  # made before, since pytest's folders lie in tempfile.tempdir too
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    monkeypatch.setenv("TENSORD_BINARY", str(binary))
    monkeypatch.setenv("TENSORD_STATE_DIR", str(folder / "state"))
    monkeypatch.setenv("TENSORD_RUNTIME_DIR", str(folder / "nobody"))
    (folder / "private").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "private"))
    return folder


def nothing_is_left(own: Path) -> bool:
    return list((own / "private").iterdir()) == [] and processes_of(own) == []


def processes_of(own: Path) -> list[str]:
    """The command lines that name the folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(process.read_text(errors="replace").replace("\0", " "))
    return [line for line in lines if str(own / "private") in line]


def test_a_folder_is_measured_and_nothing_left_in_it(own: Path, tmp_path: Path) -> None:
    environment = dict(os.environ)
    report = measuring.measured(str(tmp_path), QUICK)
    rates = report["bytes_per_s"]
    assert set(rates) == {one.name for one in MEASUREMENTS}
    for name in ("memcpy_1", "memcpy_all", "gather_all", "fresh_4k", "cache_pread"):
        assert rates[name] > 0, name
    assert report["problems"].keys() == {"io_uring", "memfd", "huge_pages"}
    assert report["machine_file"] == str(own / "state" / "machine.json")
    assert list(tmp_path.iterdir()) == [] and nothing_is_left(own)
    assert dict(os.environ) == environment


def test_a_file_is_measured_and_not_written_to(
    own: Path, make_file: Callable[..., Path], tmp_path: Path
) -> None:
    shapes = {"a": (3 << 20, 2), "b": (5000,), "c [*]": (1025, 5000), "d": (20 << 20,)}
    path = make_file({name: counted(shape, "uint8") for name, shape in shapes.items()})
    before, content = path.stat(), path.read_bytes()
    assert (
        measuring.measured(str(path), QUICK._replace(size_bytes=10 << 20))["bytes_per_s"]["cache_pread"] > 0
    )
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path] and nothing_is_left(own)
    with pytest.raises(
        tensord.InvalidArgumentError, match=r"is too small: 32.00 MiB are needed, in tensors of"
    ):
        measuring.measured(str(path), QUICK._replace(size_bytes=64 << 20))
    path.write_bytes(content[:100])
    with pytest.raises(tensord.CorruptError):
        measuring.measured(str(path), QUICK)
    with pytest.raises(tensord.NotFoundError, match="none"):
        measuring.measured(str(tmp_path / "none"), QUICK)
    assert nothing_is_left(own)


def test_a_file_is_read_by_whole_tensors_of_about_the_wanted_size(
    daemon: Daemon, make_file: Callable[..., Path]
) -> None:
    sizes = {"small": 5000, "first": 2 << 20, "huge": 40 << 20, "second": 3 << 20, "third": 4 << 20}
    path = make_file({name: counted((size,), "uint8") for name, size in sizes.items()})
    with sample_of(str(path), 5 << 20, 64 << 20) as chosen:
        assert chosen.names == ["first", "second"] and chosen.size_bytes == 5 << 20
    with sample_of(str(path), 8 << 20, 8 << 20) as chosen:
        assert chosen.names == ["first", "second"]  # what fits, if it is half of it
    with pytest.raises(
        tensord.InvalidArgumentError, match=r"16\.00 MiB are needed, in tensors of 1\.00 MiB to 32"
    ):
        sample_of(str(path), 32 << 20, 32 << 20).__enter__()


def test_a_scratch_file_is_smaller_where_memory_is_short_or_the_disk_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sample_of(str(tmp_path), 64 << 20, 9 << 20) as chosen:
        assert chosen.size_bytes == 8 << 20
    with pytest.raises(tensord.ExhaustedError, match=r"3.00 MiB .* are too little; 4.00 MiB are needed"):
        sample_of(str(tmp_path), 64 << 20, 3 << 20).__enter__()
    monkeypatch.setattr(sample, "SAMPLE_SECONDS", 0.0)
    with sample_of(str(tmp_path), 64 << 20, 64 << 20) as chosen:
        assert len(chosen.names) == 1
        assert safetensors_header(Path(chosen.path)).keys() == set(chosen.names)
    assert list(tmp_path.iterdir()) == []


def safetensors_header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    size_bytes = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size_bytes])
    assert 8 + size_bytes + max(one["data_offsets"][1] for one in header.values()) == len(content)
    return header


def test_what_cannot_be_written_is_told_and_taken_back(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "fdatasync", is_full)
    with pytest.raises(tensord.ExhaustedError, match=f"write a scratch file in {tmp_path}: No space left"):
        measuring.measured(str(tmp_path), QUICK)
    assert list(tmp_path.iterdir()) == [] and nothing_is_left(own)
    with pytest.raises(tensord.Error, match="write a scratch file in /proc"):
        measuring.measured("/proc", QUICK)


def test_what_blocks_io_uring_is_told(
    own: Path, binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filtered = own / "tensord"
    filtered.write_text(WITHOUT_IO_URING.format(python=sys.executable, binary=str(binary)))
    filtered.chmod(0o755)
    monkeypatch.setenv("TENSORD_BINARY", str(filtered))
    problems = measuring.measured(str(tmp_path), QUICK)["problems"]
    assert problems["io_uring"] == "io_uring_setup: Operation not permitted"
    assert told(look_around(problems, None)).startswith("io_uring: missing\n")


def test_a_daemon_that_does_not_start_is_told(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = own / "tensord"
    broken.write_text("#!/bin/sh\necho the reason\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TENSORD_BINARY", str(broken))
    with pytest.raises(tensord.UnavailableError, match="serve` did not start: the reason"):
        measuring.measured("", QUICK)
    assert nothing_is_left(own)


def test_rounds_end_when_their_time_is_up(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    monkeypatch.setattr(measuring, "ROUNDS_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "_touch_rate", lambda size_bytes: rounds.append(size_bytes) or 1.0)
    assert (
        measuring.measured(str(tmp_path), QUICK._replace(round_count=100))["bytes_per_s"]["fresh_4k"] == 1.0
    )
    assert rounds == [16 << 20]


def test_settings_of_the_user_do_not_count(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORD_HOST_MEMORY", "8MiB")
    monkeypatch.setenv("TENSORD_DISK_READS", "none")
    monkeypatch.setenv("TENSORD_CONFIG", str(tmp_path / "none.toml"))
    with scratch_daemon(own / "private" / "one") as status:
        assert status["limits"]["host_memory"] > 8 << 20 and "cores, Linux" in status["machine"]
        assert status["memory_limit"] is None or status["memory_limit"] > 0
    assert processes_of(own) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_doctor_that_is_ended_takes_all_with_it(own: Path, tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(own / "private")}
    doctor = subprocess.Popen([*COMMAND, "doctor", str(tmp_path)], env=environment, stdout=subprocess.DEVNULL)
    until(lambda: list(tmp_path.iterdir()) and processes_of(own), "it measures")
    doctor.send_signal(number)
    assert doctor.wait(DEADLINE_SECONDS) == -number
    until(lambda: list(tmp_path.iterdir()) == [] and nothing_is_left(own), "all is gone")


def test_what_cannot_be_measured_is_an_error_document(
    binary: Path, short_folder: Path, tmp_path: Path
) -> None:
    nobody = Daemon(binary, short_folder / "nobody")
    done = nobody.run("doctor", str(tmp_path / "none"), "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["error"]["code"] == "not_found"
    done = nobody.run("doctor", "a", "b")
    assert done.returncode == 2 and done.stdout == ""


# ---- GPUs --------------------------------------------------------------------------------------------------


def test_gpus_are_one_line_where_no_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libcuda.so.of.nobody")
    (only,) = gpu_checks()
    assert only.name == "GPUs" and only.value.startswith("no driver") and only.verdict == "good"


def test_a_driver_that_lacks_functions_gets_a_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libc.so.6")  # a library without any of them
    (only,) = gpu_checks()
    assert "cuInit" in only.value and only.verdict == "could be better" and only.advice
