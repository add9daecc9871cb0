"""What make_checkpoint.py writes is read by safetensors, equal for equal seeds, and finished when stopped."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import safetensors

sys.path.insert(0, str(Path(__file__).parent))
import make_checkpoint as maker

MIB = 1 << 20


def make(folder: Path, size_bytes: int = MIB, shards: int = 2, seed: int = 1) -> list[Path]:
    maker.make_checkpoint(folder, size_bytes, shards, seed, lambda done, total: None)
    return sorted(folder.glob("*.safetensors"))


def test_safetensors_reads_the_shapes_of_qwen3(tmp_path: Path) -> None:
    files = make(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert weight_map.pop(name) == path.name
                found[name] = file.get_tensor(name)
    assert weight_map == {}
    assert found["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert found["model.layers.0.mlp.down_proj.weight"].shape == (
        config["hidden_size"],
        config["intermediate_size"],
    )
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    first, second, other = (
        [path.read_bytes() for path in make(tmp_path / name, seed=seed)]
        for name, seed in (("first", 7), ("second", 7), ("other", 8))
    )
    assert first == second
    assert first != other


def test_a_run_that_was_stopped_is_finished_and_a_whole_one_is_left_alone(tmp_path: Path) -> None:
    kept, lost = make(tmp_path)
    lost_bytes, kept_time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    lost.with_name(lost.name + ".part").write_bytes(b"half")
    make(tmp_path)
    assert lost.read_bytes() == lost_bytes
    assert kept.stat().st_mtime_ns == kept_time
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("size_bytes", [200_000, MIB, 50 * MIB, 700 * MIB, 2048 * MIB, 29_500_000_000])
def test_the_size_is_met_to_a_row_of_the_vocabulary(size_bytes: int) -> None:
    shape = maker.choose_shape(size_bytes)
    assert math.isclose(maker.payload_bytes(shape), size_bytes, abs_tol=4 * shape.hidden)


def test_sizes_are_written_as_people_write_them() -> None:
    assert maker.parse_bytes("2GiB") == 2048 * MIB
    assert maker.parse_bytes("500MB") == 500_000_000
    assert maker.parse_bytes("4096") == 4096
