"""What the command line reads and writes, without a daemon: words in, text out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tensord
from tensord.cli import exit_status, run
from tensord.cli.explain import chrome_trace, explain_page, explain_text
from tensord.cli.packing import Slice, Tensor, packed_plan
from tensord.cli.reports import list_text, status_text, verify_text
from tensord.cli.serve import FLAGS, SETTINGS, serve_help
from tensord.cli.show import show_index, show_views
from tensord.cli.table import Table, bar, duration_text, quoted, size_text, without_controls
from tensord.cli.top import look_text, screen_text, take_look
from tensord.cli.verbs import VERBS
from tensord.cli.watch import progress_line
from tensord.cli.words import Verb
from tensord.progress import Progress

GIB = 1 << 30

DONE, FAILED, USAGE, CORRUPT, INTERRUPTED = 0, 1, 2, 4, 130

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(capfd: pytest.CaptureFixture[str]) -> Run:
    """``status, out, err = ran("load", "--json")``"""

    def do(*words: str) -> tuple[int, str, str]:
        status = run(words)
        return status, *capfd.readouterr()

    return do


# ---- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_help_with_an_example_and_knows_json(ran: Run, verb: Verb) -> None:
    if verb.name == "serve":  # else the process becomes the compiled program: test_cli.py
        status, out, _ = ran("help", "serve")
        assert status == DONE and out == serve_help() and "\nexample: tensord serve " in out
        assert all(f"\n  {one.flag} {one.value} " in out for one in SETTINGS)
        assert "--json" not in out and ran("serve", "--help")[1] == out
        return
    status, out, _ = ran(verb.name, "--help")
    assert status == DONE
    assert f"\nExample: {verb.example}\n" in out
    assert "--json  " in out
    assert ran("help", verb.name)[1] == out


def test_what_makes_no_sense_ends_with_2_and_says_why(ran: Run) -> None:
    assert ran()[0] == USAGE
    status, _, err = ran("laod")
    assert status == USAGE
    assert err == "tensord: there is no verb 'laod'; `tensord --help` says what is accepted\n"
    status, _, err = ran("load")
    assert status == USAGE
    assert err == "tensord: load: PATH is required; `tensord load --help` says what is accepted\n"
    status, _, err = ran("ls", "--wait")
    assert status == USAGE
    assert err.startswith("tensord: ls: ")
    assert ran("show", "/m", "--view", "w[x]")[0] == USAGE
    assert ran("load", "/m", "--progress", "sometimes")[0] == USAGE


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("load", "a", "b"), "The following argument was not expected: b"),
        (("load", "a", "b", "c"), "The following arguments were not expected: b c"),
        (("load", "-x"), "PATH is required"),
        (("load", "m", "--progress"), "--progress: 1 required TEXT:{auto,always,never} missing"),
        (("load", "m", "--progress=maybe"), "--progress: maybe not in {auto,always,never}"),
        (("load", "m", "--wait=x"), "Could not convert: --wait = x"),
        (("explain", "--trace="), "--trace: 1 required TEXT missing"),
        (("explain", "--trace", "a", "--trace", "b"), "--trace: At Most 1 required but received 2"),
        (("completion", "ksh"), "SHELL: ksh not in {bash,zsh,fish}"),
        (("top", "--interval", "nan"), "--interval: Value nan not in range 0.001000 to 1000.000000"),
        (("top", "--count", "-1"), "--count: Value -1 not in range 1 to 18446744073709551615"),
        (
            ("show", "m", "--view", "w[1,,2]"),
            "--view: view 'w[1,,2]': expected a number, a slice, '...' or 'None' at character 5",
        ),
        (("--json", "status"), "The following argument was not expected: --json"),
        (("--bogus",), "A subcommand is required"),
    ],
)
def test_each_mistake_is_told_in_one_line(ran: Run, words: tuple[str, ...], problem: str) -> None:
    status, _, err = ran(*words)
    verb = next((word for word in words if not word.startswith("-")), "")
    shown = f"{verb}: " if verb else ""
    accepted = f"tensord {verb} --help" if verb else "tensord --help"
    assert (status, err) == (USAGE, f"tensord: {shown}{problem}; `{accepted}` says what is accepted\n")


def test_an_error_is_a_document_with_json(ran: Run) -> None:
    status, out, err = ran("load", "--json")
    assert status == USAGE
    assert out == (
        '{"error":{"code":"invalid_argument","message":"PATH is required; `tensord load --help` says what is '
        'accepted"}}\n'
    )
    assert err == "tensord: load: PATH is required; `tensord load --help` says what is accepted\n"


def test_errors_have_the_exit_status_of_their_code() -> None:
    assert exit_status(tensord.NotFoundError("")) == FAILED
    assert exit_status(tensord.ExhaustedError("")) == FAILED
    assert exit_status(tensord.CorruptError("")) == CORRUPT
    assert exit_status(tensord.ChangedError("")) == CORRUPT
    assert exit_status(tensord.CancelledError("")) == INTERRUPTED


# ---- completion ------------------------------------------------------------------------------------------


def test_every_shell_is_offered_every_verb_and_flag(ran: Run) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "tensord --complete " in ran("completion", shell)[1]
    assert ran("completion", "ksh")[0] == USAGE
    verbs = ran("--complete", "")[1]
    for verb in VERBS:
        assert f"{verb.name}\t{verb.summary}\n" in verbs
        flags = ran("--complete", verb.name, "-")[1]
        if verb.name == "serve":  # its flags are the daemon's
            assert all(f"{flag}\t{meaning}\n" in flags for flag, _, meaning in FLAGS)
            continue
        for flag in verb.flags:
            assert f"{flag.name}\t{flag.summary}\n" in flags


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("un",), "unpin\tlet a replica be evicted again\n"),
        (("--ver",), "--version\tprint the version\n"),
        (("load", "--progress", "a"), "auto\nalways\n"),
        (("load", "--wait", "m"), "<files>\n"),
        (("load", "--only", ""), ""),
        (("explain", "--trace", "t"), "<files>\n"),
        (("completion", "f"), "fish\n"),
        (("serve", "--drain"), "--drain-seconds\thow long SIGTERM lets running loads finish (default: 10)\n"),
        (
            ("serve", "--memory-wait"),
            "--memory-wait-seconds\thow long an open waits for memory that others hold (default: 30)\n",
        ),
        (("ls", "x"), ""),
        (("laod", "-"), ""),
    ],
)
def test_the_word_before_decides_and_the_word_itself_selects(
    ran: Run, words: tuple[str, ...], offered: str
) -> None:
    assert ran("--complete", *words)[1] == offered


# ---- tables, bars, numbers -------------------------------------------------------------------------------


def test_columns_are_aligned_and_lines_end_with_their_last_word() -> None:
    table = Table("name", ">size", "note")
    table.add("w", "12 B", "")
    table.add("gewölbe", "3 B", "x")
    assert table.text() == "name     size  note\nw        12 B\ngewölbe   3 B  x\n"


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (999, "999 ns"),
        (1_500, "1.5 us"),
        (1_500_000, "1.50 ms"),
        (2_340_000_000, "2.34 s"),
        (62_000_000_000, "1 min 2 s"),
        (7_260_000_000_000, "2 h 1 min"),
    ],
)
def test_durations_have_the_unit_that_fits(ns: int, shown: str) -> None:
    assert duration_text(ns) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1000 << 10, "1000.00 KiB"),
        (2 * GIB, "2.00 GiB"),
        ((1 << 40) - 1, "1024.00 GiB"),
        (2**64 - 1, "16.00 EiB"),
        (1 << 75, "32768.00 EiB"),
    ],
)
def test_sizes_have_the_unit_that_fits(count: int, shown: str) -> None:
    assert size_text(count) == shown


def test_bars_are_clipped() -> None:
    assert bar(0.5, 4) == "##.."
    assert bar(7, 4) == "####"
    assert bar(-1, 4) == "...."
    assert bar(float("nan"), 4) == "...."


def test_names_cannot_move_the_cursor() -> None:
    assert quoted("a'b\\\x1b[2J\x9b") == r"'a\'b\\\x1b[2J\x9b'"
    assert quoted("n" * 201) == f"'{'n' * 200}...'"
    assert without_controls("a\x1b[2J\x07\r\t\x7f\x9b\nb") == "a?[2J?????\nb"


# ---- progress --------------------------------------------------------------------------------------------


def test_a_line_tells_share_bytes_rate_and_the_time_left() -> None:
    half = Progress(GIB, 2 * GIB, 0.5, GIB / 0.5)
    assert progress_line(half, 73) == (
        "[##########..........]  50 %  1.00 GiB of 2.00 GiB  2.15 GB/s  0.5 s left"
    )
    done = Progress(2 * GIB, 2 * GIB, 1.0, 2.0 * GIB)
    assert progress_line(done, 73) == (
        "[####################]  100 %  2.00 GiB of 2.00 GiB  2.15 GB/s  in 1.00 s"
    )
    idle = Progress(GIB, 2 * GIB, 9.0, 1e9, 5.9)
    assert progress_line(idle, 73).endswith("50 %  1.00 GiB of 2.00 GiB  nothing for 5 s")
    slow = Progress(GIB, 2 * GIB, 1.0, GIB / 90)
    assert progress_line(slow, 80).endswith("0.01 GB/s  1 min 30 s left")


def test_a_line_counts_only_what_it_saw_and_fits_narrow_terminals() -> None:
    resident = Progress(100, 100, 5e-9, 0.0)
    assert progress_line(resident, 80) == (
        "[########################################]  100 %  100 B of 100 B"
    )
    assert progress_line(resident, 20) == "100 %  100 B of 100 "
    assert progress_line(Progress(0, 0, 0.0, 0.0), 20) == "100 %  0 B of 0 B"


# ---- explain ---------------------------------------------------------------------------------------------


EXPLAINED = """{"load": 3, "replica": 1, "path": "/m", "artifact": null, "state": "ready",
 "error": null, "wall_ns": 500000000, "bytes": 2147483648, "gb_per_s": 4.29, "read_threads": 2,
 "disk_bytes": 0, "cached_bytes": 1073741824, "direct_bytes": 1073741824, "buffered_bytes": 0,
 "read_path": "io_uring, O_DIRECT", "notes": ["no huge pages"], "checked_against": "first_load",
 "served": "load", "origin_ns": 1000, "span_ns": 600000000, "moved_bytes": 2147483648, "moved_ns": 500000000,
 "achieved_gb_per_s": 4.29, "possible_gb_per_s": null, "possible_by": "", "rates_known": false, "phases": [
 {"lane": "daemon", "name": "index", "begin_ns": 0, "end_ns": 100000, "ns": 100000, "thread_ns": 100000,
 "bytes": 0},
 {"lane": "daemon", "name": "touch", "begin_ns": 0, "end_ns": 0, "ns": 0, "thread_ns": 0, "bytes": 0},
 {"lane": "daemon", "name": "read", "begin_ns": 60000000, "end_ns": 500000000, "ns": 396000000,
  "thread_ns": 792000000, "bytes": 2147483648, "gb_per_s": 5.42},
 {"lane": "daemon", "name": "check", "begin_ns": 60000000, "end_ns": 500000000, "ns": 44000000,
  "thread_ns": 88000000, "bytes": 2147483648, "gb_per_s": 48.8},
 {"lane": "python3 7", "name": "copy", "begin_ns": 450000000, "end_ns": 600000000, "ns": 75000000,
  "thread_ns": 150000000, "bytes": 1000000000, "gb_per_s": 13.33}],
 "limited_by": "page cache", "advice": "More threads may help.",
 "uses": [{"pid": 7, "name": "python3", "map_ns": 50000, "plan_ns": 3000, "wait_ns": 0, "copy_ns": 100000000,
           "copy_bytes": 1000000000, "record_count": 3, "thread_count": 2}],
 "trace": [{"name": "read", "thread": "read 0", "begin_ns": 1000, "end_ns": 3500, "bytes": 1048576,
 "block": 4}]}"""


def explained(**fields: Any) -> str:
    return json.dumps({**json.loads(EXPLAINED), **fields})


def test_explain_draws_a_waterfall_over_one_time_axis() -> None:
    assert explain_text(explained()) == (
        "load 3 of /m: ready\n"
        "2.00 GiB in 500.00 ms, 4.29 GB/s\n"
        "what is possible here is not known: run `tensord doctor` once\n"
        "threads: 2; 1.00 GiB from the page cache, 1.00 GiB by io_uring, O_DIRECT\n"
        "the first load of these files: their digests were recorded\n"
        "no huge pages\n"
        "\n"
        "phase      0                              600.00 ms       time   GB/s\n"
        "index      #                                          100.0 us\n"
        "read           #############################         396.00 ms   5.42\n"
        "check          -----------------------------          44.00 ms  48.80\n"
        "python3 7\n"
        "  copy                                   ==========   75.00 ms  13.33\n"
        "\n"
        "limited by: page cache\nMore threads may help.\n"
    )
    with pytest.raises(tensord.InternalError):
        explain_text("{}")


def test_explain_says_what_is_possible_where_the_machine_was_measured() -> None:
    told = explain_text(explained(possible_gb_per_s=5.5, possible_by="disk"))
    assert "4.29 GB/s, of 5.50 GB/s that are possible here (disk)" in told


def test_more_clients_than_fit_are_counted() -> None:
    copy = json.loads(EXPLAINED)["phases"][-1]
    lanes = [{**copy, "lane": f"p {number}"} for number in range(11)]
    told = explain_text(explained(phases=lanes))
    assert "\np 7\n" in told and "\np 8\n" not in told and "\nand 3 more clients\n" in told


def test_a_page_carries_the_report_and_no_name_ends_its_script() -> None:
    page = explain_page(explained(path="</script><!--<b>"))
    assert "</script><!--" not in page
    assert "\\u003c/script>\\u003c!--\\u003cb>" in page
    assert "@report@" not in page
    assert '"trace":' not in page  # spans stay out of it


def test_phases_and_spans_become_a_chrome_trace_with_a_track_for_each() -> None:
    phases = json.loads(EXPLAINED)["phases"]
    assert chrome_trace(explained(phases=phases[:1])) == (
        '{"displayTimeUnit":"ms","traceEvents":['
        '{"args":{"name":"daemon: index"},"name":"thread_name","ph":"M","pid":1,"tid":1},'
        '{"args":{"bytes":0,"lane":"daemon","ns":100000,"thread_ns":100000},"dur":100.0,"name":"index",'
        '"ph":"X","pid":1,"tid":1,"ts":1.0},'
        '{"args":{"name":"read 0"},"name":"thread_name","ph":"M","pid":1,"tid":2},'
        '{"args":{"block":4,"bytes":1048576},"dur":2.5,"name":"read","ph":"X","pid":1,"tid":2,"ts":1.0}]}'
    )
    with pytest.raises(tensord.NotFoundError):
        chrome_trace("{}")


# ---- top -------------------------------------------------------------------------------------------------


def test_a_look_has_rates_since_the_one_before_and_the_time_that_is_left() -> None:
    def status(loaded: int) -> str:
        return f"""{{"pid": 1, "memory": {{"in_use": 4096, "kept": 0}}, "limits": {{"host_memory": 8192}},
            "replicas": 1, "connections": 1, "loads_running": 1, "disk_bytes": 0,
            "loaded_bytes": {loaded}}}"""

    def listed(ready: int) -> str:
        return f"""{{"replicas": [{{"replica": 1, "path": "/m", "artifact": null, "state": "filling",
            "error": null, "payload_bytes": 9, "memory_bytes": 4096, "total_bytes": 4000, "tensor_count": 1,
            "files": [], "pinned": false, "leases": [], "idle_s": 0, "ready_bytes": {ready}}}]}}"""

    first = take_look(status(1000), listed(1000), "", 10)
    look = take_look(status(3000), listed(3000), first, 12)
    assert '"loaded_bytes_per_s":1000.0' in look
    assert '"bytes_per_s":1000.0' in look
    shown = look_text(look)
    assert shown.line == (
        "1 replica, 1 load, 1 client, memory 4.00 KiB in use + 0 B kept of 8.00 KiB, loading 0.00 GB/s, "
        "disk 0.00 GB/s\n"
    )
    assert "]  75 %  2.93 KiB of 3.91 KiB  0.00 GB/s  1.0 s left  /m\n" in shown.screen
    with pytest.raises(tensord.InternalError):
        look_text("{}")
    with pytest.raises(tensord.InternalError):
        take_look("{}", "{}", "", 1)


def test_a_screen_ends_at_its_edge() -> None:
    assert screen_text("a\x07\nb\nc\nd", 2) == "\x1b[?7l\x1b[Ha?\x1b[K\nb\x1b[K\nc\x1b[K\x1b[J\x1b[?7h"


# ---- reports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "report", ["", "[", "7", "{}", '{"replicas": 7}', '{"replicas": [{}]}', "[" * 100_000]
)
@pytest.mark.parametrize("tell", [status_text, list_text, verify_text])
def test_an_answer_that_is_none_is_an_error(tell: Callable[[str], Any], report: str) -> None:
    with pytest.raises(tensord.InternalError, match="the daemon's answer cannot be read: "):
        tell(report)


REPLICAS = """{"replicas": [
{"replica": 1, "path": "/m/a", "artifact": "0123456789abcdef0123456789abcdef", "state": "ready",
"error": null,
"payload_bytes": 1024, "memory_bytes": 4096, "ready_bytes": 1024, "total_bytes": 1024, "tensor_count": 3,
"files": [], "pinned": true, "idle_s": 0,
"leases": [{"pid": 7, "name": "python3", "held_s": 2}, {"pid": 7, "name": "python3", "held_s": 1}]},
{"replica": 12, "path": "/m/b", "artifact": null, "state": "filling", "error": null, "payload_bytes": 1000,
"memory_bytes": 4096, "ready_bytes": 250, "total_bytes": 1000, "tensor_count": 1, "files": [],
"pinned": false,
"idle_s": 61.5, "leases": []},
{"replica": 13, "path": "/m/c", "artifact": null, "state": "failed", "memory_bytes": 0, "pinned": false,
"idle_s": 1,
"error": {"code": "changed", "message": "read /m/c: it grew"}, "leases": []}]}"""


def test_a_list_tells_who_holds_what() -> None:
    assert list_text(REPLICAS) == (
        "replica  state             size  tensors  artifact      held by                path\n"
        "      1  ready         1.00 KiB        3  0123456789ab  pinned, python3 7 (2)  /m/a\n"
        "     12  filling 25 %    1000 B        1  -             - (idle 1 min 1 s)     /m/b\n"
        "     13  failed             0 B        0  -             - (idle 1.00 s)        /m/c\n"
        "replica 13 failed: read /m/c: it grew\n"
    )


def test_verify_names_file_tensor_and_block() -> None:
    fault = {"file": "/m/x.safetensors", "tensor": "w", "leaf": 2, "offset": 2097152, "size_bytes": 1048576}
    report = {"replica": 1, "path": "/m", "artifact": "00", "leaf_count": 9, "bytes": 10**6, "ns": 10**6}
    verified = verify_text(json.dumps({**report, "faults": [fault]}))
    assert not verified.is_sound
    assert verified.text == (
        "/m/x.safetensors: tensor 'w', block 2 (1048576 B at 2097152): not what was loaded first\n"
        "/m: 1 corrupt block; 9 blocks, 976.56 KiB checked in 1.00 ms, 1.00 GB/s\n"
    )


# ---- show ------------------------------------------------------------------------------------------------

FILES = [
    {"path": "/m/one.safetensors", "size_bytes": 1060},
    {"path": "/m/two.safetensors", "size_bytes": 520},
]
TENSORS = [
    Tensor("a", "F16", (4, 6), 48, 0, 1000),
    Tensor("b", "F32", (3,), 12, 0, 1048),
    Tensor("c", "Q5", (2,), 20, 1, 500),
]


def record(**fields: Any) -> dict[str, Any]:
    whole = {"kind": "copy", "source": 0, "source_pitch": 0, "target_pitch": 0, "row_count": 1, "outer": []}
    return {**whole, **fields}


def test_an_index_is_a_table_of_tensors_and_files() -> None:
    assert show_index("/m", FILES, TENSORS, {"format": "pt"}).text == (
        "/m: 3 tensors, 80 B\n"
        "\n"
        "tensor  dtype  shape   size  file\n"
        "a       F16    [4, 6]  48 B     0\n"
        "b       F32    [3]     12 B     0\n"
        "c       Q5     [2]     20 B     1\n"
        "\n"
        "file      size  path\n"
        "   0  1.04 KiB  /m/one.safetensors\n"
        "   1     520 B  /m/two.safetensors\n"
        "metadata  'format' = 'pt'\n"
    )


def test_slices_are_packed_row_by_row() -> None:
    a, b, c = TENSORS
    plan = packed_plan(
        [
            Slice("a[:, 0:3]", a, 0, 2, (4, 3), (12, 2)),
            Slice("b", b, 0, 4, (3,), (4,)),
            Slice("c[0:0]", c, 0, 1, (0,), (1,)),
        ]
    )
    assert plan["target_bytes"] == 40
    assert plan["items"] == [
        {"view": "a[:, 0:3]", "tensor": "a", "dtype": "F16", "shape": (4, 3)}
        | {"target_offset": 0, "size_bytes": 24},
        {"view": "b", "tensor": "b", "dtype": "F32", "shape": (3,), "target_offset": 24, "size_bytes": 12},
        {"view": "c[0:0]", "tensor": "c", "dtype": "Q5", "shape": (0,), "target_offset": 40, "size_bytes": 0},
    ]
    assert plan["records"] == [
        record(source_offset=1000, target_offset=0, row_bytes=6)
        | {"source_pitch": 12, "target_pitch": 6, "row_count": 4},
        record(source_offset=1048, target_offset=24, row_bytes=12),
        record(kind="fill", source_offset=0, target_offset=36, row_bytes=4),
    ]
    assert packed_plan([]) == {"items": [], "records": [], "target_bytes": 0}


def test_loops_that_go_on_where_the_inner_one_ends_are_one() -> None:
    whole = Slice("x[::2, :, ::-1]", Tensor("x", "U8", (8, 5, 7), 280, 1, 16), 6, 1, (4, 5, 7), (70, 7, -1))
    (copied, _) = packed_plan([whole])["records"]
    assert copied == record(source=1, source_offset=22, target_offset=0, row_bytes=1) | {
        "source_pitch": -1,
        "target_pitch": 1,
        "row_count": 7,
        "outer": [
            {"count": 5, "source_pitch": 7, "target_pitch": 7},
            {"count": 4, "source_pitch": 70, "target_pitch": 35},
        ],
    }
    rows = Slice("y", Tensor("y", "F32", (6, 2, 4, 8), 1536, 0, 0), 0, 4, (3, 2, 4, 4), (512, 128, 32, 4))
    assert packed_plan([rows])["records"] == [
        record(source_offset=0, target_offset=0, row_bytes=16)
        | {"source_pitch": 32, "target_pitch": 16, "row_count": 8}
        | {"outer": [{"count": 3, "source_pitch": 512, "target_pitch": 128}]}
    ]


def test_a_view_is_the_plan_of_a_packed_copy() -> None:
    item = {"view": "a[:, 0:3]", "tensor": "a", "dtype": "F16", "shape": [4, 3]}
    plan = {
        "files": FILES,
        "items": [
            {**item, "target_offset": 0, "size_bytes": 24},
            {"view": "b", "tensor": "b", "dtype": "F32", "shape": [3], "target_offset": 24, "size_bytes": 12},
        ],
        "records": [
            record(source_offset=1000, target_offset=0, row_bytes=6)
            | {"source_pitch": 12, "target_pitch": 6, "row_count": 4},
            record(source_offset=1048, target_offset=24, row_bytes=12),
            record(kind="fill", source_offset=0, target_offset=36, row_bytes=4),
        ],
        "target_bytes": 40,
    }
    assert show_views("/m", TENSORS, plan).text == (
        "view       dtype  shape   size  of the tensor  at\n"
        "a[:, 0:3]  F16    [4, 3]  24 B         50.0 %   0\n"
        "b          F32    [3]     12 B        100.0 %  24\n"
        "\n"
        "plan of a packed copy: 40 B in 3 records (source offset -> target offset; s1: is file 1)\n"
        "1000 pitch 12 -> 0 pitch 6   4 rows x 6 B\n"
        "1048 -> 24   1 row x 12 B\n"
        "fill -> 36   1 row x 4 B\n"
        "\n"
        "file      size  path\n"
        "   0  1.04 KiB  /m/one.safetensors\n"
        "   1     520 B  /m/two.safetensors\n"
    )


def test_a_record_tells_its_file_and_its_loops() -> None:
    loop = {"count": 4, "source_pitch": 96, "target_pitch": 48}
    rows = {"target_offset": 0, "row_bytes": 6, "row_count": 8, "target_pitch": 6}
    copied = record(source=1, source_offset=1006, source_pitch=12, **rows, outer=[loop])
    filled = record(kind="fill", source_offset=0, **rows, outer=[loop])
    plan = {"files": FILES[:1], "items": [], "records": [copied, filled], "target_bytes": 0}
    assert show_views("/m", TENSORS, plan).text.splitlines()[-2:] == [
        "s1:1006 pitch 12 -> 0 pitch 6   8 rows x 6 B   x 4 pitch 96 -> 48",
        "fill -> 0 pitch 6   8 rows x 6 B   x 4 pitch -> 48",
    ]
