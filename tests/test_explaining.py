"""Why a load took as long as it did: facts in, explanation out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tensord.explaining import explain

MS = 1_000_000
RATES = ("memcpy_all", "cache_pread", "cache_stream", "disk_direct", "disk_buffered")


def some_load(**fields: Any) -> dict[str, Any]:
    """Index 0-5 ms, waits for memory 8-10 ms, fills 10-110 ms."""
    facts = {
        "load": 1,
        "replica": 1,
        "path": "/m",
        "state": "ready",
        "error": None,
        "begin_ns": 1000 * MS,
        "fill_ns": 1010 * MS,
        "reopened_ns": 0,
        "wall_ns": 110 * MS,
        "index_ns": 5 * MS,
        "memory_ns": 2 * MS,
        "touch_ns": 30 * MS,
        "read_ns": 150 * MS,
        "check_ns": 20 * MS,
        "bytes": 100_000_000,
        "read_threads": 2,
        "cpu_ns": 195 * MS,
        "cached_bytes": 100_000_000,
        "direct_bytes": 0,
        "buffered_bytes": 0,
        "rates": None,
        "uses": [],
    }
    return {**facts, **fields}


def some_use(map_begin_ms: int, begin_ms: int, **fields: Any) -> dict[str, Any]:
    use = {
        "pid": 7,
        "name": "python",
        "begin_ns": begin_ms * MS,
        "map_begin_ns": map_begin_ms * MS,
        "map_ns": MS,
        "plan_ns": MS,
        "wait_ns": 20 * MS,
        "copy_ns": 40 * MS,
        "copy_bytes": 1000,
        "record_count": 1,
        "thread_count": 2,
    }
    return {**use, **fields}


def text_of(explained: dict[str, Any]) -> list[str]:
    def ms(phase: dict[str, Any], name: str) -> int:
        return int(phase[name]) // MS

    return [
        f"{one['lane']} {one['name']} {ms(one, 'begin_ns')}-{ms(one, 'end_ns')} {ms(one, 'ns')}"
        for one in explained["phases"]
    ]


def test_a_load_is_index_memory_touch_read_and_check_on_one_axis() -> None:
    explained = explain(some_load())
    assert text_of(explained) == [
        "daemon index 0-5 5",
        "daemon wait_for_memory 8-10 2",
        "daemon touch 10-110 15",
        "daemon read 10-110 75",
        "daemon check 10-110 10",
    ]
    assert explained["limited_by"] == "page cache"
    assert explained["served"] == "load" and explained["origin_ns"] == 1000 * MS
    assert explained["span_ns"] == explained["moved_ns"] == 110 * MS
    assert explained["achieved_gb_per_s"] == explained["gb_per_s"] == pytest.approx(100 / 110)


def test_facts_are_told_on_but_for_times_that_phases_tell_better() -> None:
    explained = explain(some_load(uses=[some_use(1001, 1112)]))
    assert explained["path"] == "/m" and explained["cpu_ns"] == 195 * MS
    assert not {"begin_ns", "fill_ns", "index_ns", "touch_ns", "rates"} & explained.keys()
    assert explained["uses"][0]["copy_ns"] == 40 * MS and "begin_ns" not in explained["uses"][0]


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        ({"index_ns": 200 * MS}, "index"),
        ({"memory_ns": 200 * MS}, "waiting for memory"),
        ({"touch_ns": 180 * MS, "cpu_ns": 350 * MS}, "fresh memory"),
        ({"check_ns": 180 * MS, "cpu_ns": 350 * MS}, "hashing"),
        ({"cpu_ns": 20 * MS}, "lock"),
        ({"cached_bytes": 0, "direct_bytes": 100_000_000, "cpu_ns": 20 * MS}, "disk"),
        ({"uses": [some_use(1001, 1300)]}, "waiting for the client"),
        ({"uses": [some_use(1001, 1112, copy_ns=500 * MS)]}, "memory copy"),
        ({name: 0 for name, value in some_load().items() if isinstance(value, int)}, "none"),
    ],
)
def test_names_what_took_longest(changed: dict[str, Any], limit: str) -> None:
    assert explain(some_load(**changed))["limited_by"] == limit


def test_what_is_possible_is_the_slower_of_disk_and_page_cache() -> None:
    unknown = explain(some_load())
    assert unknown["possible_gb_per_s"] is None and unknown["rates_known"] is False
    rates = dict.fromkeys(RATES, 10e9)
    cached = explain(some_load(rates=rates))
    assert cached["possible_gb_per_s"] == pytest.approx(10) and cached["rates_known"] is True
    assert cached["possible_by"] == "page cache"
    on_disk = some_load(cached_bytes=0, direct_bytes=100_000_000, rates={**rates, "disk_direct": 2e9})
    assert explain(on_disk)["possible_by"] == "disk"
    assert explain(on_disk)["possible_gb_per_s"] == pytest.approx(2)
    del on_disk["rates"]["disk_direct"]  # never measured
    assert explain(on_disk)["possible_gb_per_s"] is None and explain(on_disk)["possible_by"] == ""


def test_a_resident_replica_shows_only_what_clients_did_since_it_was_opened() -> None:
    uses = [some_use(1001, 1100), some_use(5001, 5010), some_use(5001, 5060)]
    explained = explain(
        some_load(uses=uses, reopened_ns=5000 * MS, rates=dict.fromkeys(RATES, 10e9)),
    )
    assert explained["served"] == "resident" and explained["origin_ns"] == 5000 * MS
    assert explained["moved_bytes"] == 2000
    assert explained["moved_ns"] == explained["span_ns"] == 101 * MS
    assert explained["possible_by"] == "memory copy"
    assert text_of(explained) == [
        "python 7 map 1-2 1",
        "python 7 wait_for_client 2-101 17",
        "python 7 plan 10-61 2",
        "python 7 wait 11-101 20",
        "python 7 copy 11-101 60",
    ]
    assert explained["limited_by"] == "memory copy"
    assert len(explained["uses"]) == 3


def waiting(memory_ns: int) -> dict[str, Any]:
    return some_load(
        state="waiting", fill_ns=0, bytes=0, touch_ns=0, read_ns=0, check_ns=0, memory_ns=memory_ns
    )


def failed() -> dict[str, Any]:
    return some_load(state="failed", error={"code": "changed", "message": "it grew; load it again"})


def test_loads_that_wait_or_failed_say_so() -> None:
    assert explain(waiting(50 * MS))["limited_by"] == "waiting for memory"
    assert explain(waiting(0))["limited_by"] == "index"
    assert explain(failed())["advice"] == "The error says what to do."


@pytest.mark.parametrize("spoil", [dict.clear, lambda facts: facts.update(uses=[7])])
def test_what_is_no_report_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    facts = some_load()
    spoil(facts)
    with pytest.raises((LookupError, TypeError)):
        explain(facts)
