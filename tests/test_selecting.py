"""Which replica a word means: what `list` tells in, numbers out."""

from __future__ import annotations

import os
from typing import Any

import pytest
from tensord.cli.selecting import load_of, replica_of
from tensord.errors import Error, InvalidArgumentError, NotFoundError

ID = "0123456789abcdef0123456789abcdef"
OTHER_ID = "0123ffff89abcdef0123456789abcdef"


def some_replica(number: int, path: str = "/m", **fields: Any) -> dict[str, Any]:
    replica = {
        "replica": number,
        "path": path,
        "paths": [path],
        "files": [f"{path}/model.safetensors"],
        "artifact": None,
        "device": None,
        "only": None,
    }
    return {**replica, **fields}


def listed(*replicas: dict[str, Any], loads: list[tuple[int, str]] | None = None, last: int = 0) -> Any:
    told = [{"replica": number, "path": path} for number, path in loads or []]
    return {"replicas": list(replicas), "loads": told, "last": last}


@pytest.mark.parametrize("word", ["/m", "/link", "/m/model.safetensors", ID, ID[:4], "7", "last"])
def test_a_replica_is_meant_by_its_paths_its_file_its_id_its_number_and_last(word: str) -> None:
    meant = some_replica(7, paths=["/m", "/link"], artifact=ID)
    assert replica_of(listed(some_replica(3, "/other"), meant, last=7), word) == 7
    assert load_of(listed(some_replica(3, "/other"), meant, last=7), word) == 7


@pytest.mark.parametrize("word", ["", ID[:3], "/mx", "999", "last", "/m/model-1.safetensors"])
def test_what_is_not_resident_is_told_with_where_to_look(word: str) -> None:
    two_files = some_replica(7, artifact=ID, files=["/m/model-1.safetensors", "/m/model-2.safetensors"])
    with pytest.raises(NotFoundError, match=r"no replica of '.*' is resident; `tensord ls` lists them"):
        replica_of(listed(two_files), word)


def test_a_number_comes_before_an_id_that_begins_with_it() -> None:
    assert replica_of(listed(some_replica(1, artifact="7777" * 8), some_replica(7777, "/n")), "7777") == 7777


def test_of_one_path_the_newest_is_meant_and_a_whole_one_before_a_part() -> None:
    assert replica_of(listed(some_replica(1), some_replica(2)), "/m") == 2
    assert replica_of(listed(some_replica(1), some_replica(2, only=["w"])), "/m") == 1
    assert replica_of(listed(some_replica(1, only=["v"]), some_replica(2, only=["w"])), "/m") == 2


def test_a_path_means_the_copy_in_host_memory_where_there_is_one() -> None:
    on_device = some_replica(2, device="GPU-1")
    assert replica_of(listed(some_replica(1), on_device), "/m") == 1
    assert replica_of(listed(on_device), "/m") == 2
    without_source = {name: value for name, value in on_device.items() if name != "files"}
    with pytest.raises(NotFoundError):
        replica_of(listed(without_source), "/m")


def test_the_beginning_of_two_ids_is_refused() -> None:
    several = listed(some_replica(1, "/a", artifact=ID), some_replica(2, "/b", artifact=OTHER_ID))
    with pytest.raises(InvalidArgumentError, match="'0123' stands for 2 replicas; use a replica's number"):
        replica_of(several, "0123")


@pytest.mark.parametrize(("word", "number"), [("/failed", 5), ("5", 5), ("/waits", 9), ("last", 9)])
def test_loads_are_known_that_failed_or_wait(word: str, number: int) -> None:
    loads = [(4, "/failed"), (5, "/failed"), (7, "/m"), (9, "/waits")]
    assert load_of(listed(some_replica(7), loads=loads, last=9), word) == number


def test_the_last_load_is_the_newest_where_what_was_opened_last_is_not_known() -> None:
    assert load_of(listed(some_replica(7), loads=[(7, "/m"), (5, "/gone")], last=12), "last") == 5
    for nothing in ("last", "/m"):
        with pytest.raises(Error, match="is resident"):
            load_of(listed(), nothing)


def test_a_path_of_any_bytes_means_the_replica_that_shows_it() -> None:
    path = os.fsdecode(b"/models/\xff\xfe.safetensors")
    shown = os.fsencode(path).decode("utf-8", "replace")
    assert replica_of(listed(some_replica(7, shown)), path) == 7
    assert load_of(listed(loads=[(8, shown)]), path) == 8
