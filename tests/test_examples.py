"""The compiled examples, against a real daemon."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEADLINE_SECONDS, Daemon, counted


@pytest.fixture(params=["open_c", "open_cc"])
def example(binary: Path, request: pytest.FixtureRequest) -> Path:
    path = binary.resolve().parent / "examples" / request.param
    if not path.exists():
        pytest.skip(f"{path} was not built (TENSORD_TESTS=OFF?)")
    return path


def run(example: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [example, *paths],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def test_lists_tensors_and_loads_half_a_matrix(
    example: Path, daemon: Daemon, make_file: Callable[..., Path]
) -> None:
    tensors = {"bias": counted((7,)), "weight": counted((300, 5)), "x": counted((2, 2), "int64")}
    path = make_file(tensors, {"format": "pt"})
    done = run(example, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "bias F32 [7]",
        "weight F32 [300, 5]",
        "x I64 [2, 2]",
        "weight[:, -2:]: 2400 bytes in 1 records, as in the mapping",
    ]
    if example.name == "open_cc":
        assert done.stderr.splitlines() == [f"open_cc: {path}", "open_cc: format is pt"]


def test_opens_a_folder_of_shards(example: Path, daemon: Daemon, make_shards: Callable[..., Path]) -> None:
    folder = make_shards([{"a": counted((4, 4))}, {"b": counted((3,))}])
    done = run(example, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["a F32 [4, 4]", "b F32 [3]"]


def test_says_what_is_wrong_and_exits_with_the_code(example: Path, daemon: Daemon, tmp_path: Path) -> None:
    done = run(example, tmp_path / "missing.safetensors")
    assert done.returncode == 1  # TENSORD_NOT_FOUND
    assert "missing.safetensors" in done.stderr
    assert not done.stdout
