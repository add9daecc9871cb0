"""The benchmarks in tiny mode: with another loader beside ours, and what is drawn from their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE_SECONDS, REPOSITORY


@pytest.fixture
def bench(binary: Path) -> Path:
    path = binary.resolve().parent / "bench" / "tensord_bench"
    if not path.exists():
        pytest.skip(f"{path} was not built (TENSORD_TESTS=OFF?)")
    return path


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )


def tiny(bench: Path, folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(bench, "--tiny", "--folder", folder, "--peers", sys.executable, *words)


def test_a_peer_loads_and_gathers_the_same_bytes_in_a_process_of_its_own(bench: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    cases = ("--case", "hot_load", "--case", "small", "--case", "first_tensor")
    done = tiny(bench, tmp_path, *cases, "--peer", "safetensors, copied")
    assert done.returncode == 0, done.stdout + done.stderr
    # Two sizes, all tensors and slices of them, the first tensor at least hot.
    assert done.stdout.count("    safetensors, copied: works") >= 5


def test_what_a_peer_cannot_do_is_said_with_the_reason(bench: Path, tmp_path: Path) -> None:
    done = tiny(bench, tmp_path, "--case", "first_tensor", "--peer", "fastsafetensors")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "    fastsafetensors: cannot: " in done.stdout


def test_a_peer_that_does_not_start_fails_the_case(bench: Path, tmp_path: Path) -> None:
    done = tiny(bench, tmp_path, "--case", "churn", "--peer", "no such loader")
    assert done.returncode == 1
    assert "a peer is gone" in done.stderr


def test_tables_replace_what_stands_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    peers = [
        {"name": "other", "seconds": 0.5, "cpu_s": 0.4, "ratio": 2.0, "spread": 0.2, "void": True},
        {"name": "older", "cannot": "has no slices"},
    ]
    details = {
        "product_gb_s": 8.0,
        "ceiling_gb_s": 10.0,
        "product_cpu_s": 0.3,
        "ceiling_cpu_s": 0.2,
        "row_bytes": 256.0,
        "pitch_factor": 2.0,
    }
    figure = {
        "case": "hot_load",
        "name": "2 GB",
        "unit": "of ceiling",
        "value": 0.8,
        "spread": 0.1,
        "void": False,
        "met": False,
        "goal": {"sign": ">=", "value": 0.92},
        "details": details,
        "samples": [0.7, 0.8, 0.9],
        "peers": peers,
    }
    machine = {"processor": "some", "cores": 2}
    results = {
        "machine": machine,
        "commit": "abc",
        "build_type": "RelWithDebInfo",
        "peers": {"other": "1.2"},
        "figures": [figure],
    }
    source, document = tmp_path / "results.json", tmp_path / "page.md"
    source.write_text(json.dumps(results))
    document.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    texts = []
    for _ in range(2):
        done = run(sys.executable, REPOSITORY / "bench" / "plot.py", source, "--docs", document)
        assert done.returncode == 0, done.stderr
        texts.append(document.read_text())
    assert texts[0] == texts[1]
    assert texts[0].startswith("before\n")
    assert texts[0].endswith("\nafter\n")
    assert "| hot_load | 2 GB | 0.8 of ceiling | 10.0% | >= 0.92 **missed** |" in texts[0]
    assert "| hot_load | 2 GB | other | 500 ms | 400 ms | 2 x | 20.0% void |" in texts[0]
    assert "cannot: has no slices" in texts[0]
    assert "other 1.2" in texts[0]
    assert "old\n" not in texts[0]
    assert (tmp_path / "peers.svg").read_text().count("<rect") == 2
