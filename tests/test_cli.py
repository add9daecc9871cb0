"""The command line as its users meet it: real processes, a real daemon, a real shell."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import COMMAND, DEADLINE_SECONDS, Daemon, counted
from processes import until
from tensord.cli.serve import FLAGS

VERBS = (
    *("serve", "stop", "status", "load", "ls", "show", "verify", "explain", "evict", "pin", "unpin"),
    *("version", "completion", "help", "doctor", "top"),
)

DONE, FAILED, USAGE, NO_DAEMON, CORRUPT, INTERRUPTED = 0, 1, 2, 3, 4, 130


@pytest.fixture
def model(make_file: Callable[..., Path]) -> Path:
    return make_file({"w": counted((8, 6)), "b": counted((5,), "int16")}, metadata={"format": "pt"})


@pytest.fixture
def no_daemon(binary: Path, short_folder: Path) -> Iterator[Daemon]:
    """Folders in which no daemon runs; one that a test has started there is stopped."""
    folder = short_folder / "nobody"
    folder.mkdir(exist_ok=True)
    nobody = Daemon(binary, folder)
    yield nobody
    if nobody.listens():
        nobody.run("stop")


def one_document(text: str) -> Any:
    assert text.endswith("\n") and text.count("\n") == 1
    return json.loads(text)


# ---- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(no_daemon: Daemon, verb: str) -> None:
    done = no_daemon.run(verb, "--help")
    assert done.returncode == DONE
    assert "xample: " in done.stdout
    assert "tensord " + verb in done.stdout
    assert verb in no_daemon.run("--help").stdout


@pytest.mark.parametrize(
    "words",
    [(), ("laod",), ("load",), ("load", "a", "b"), ("ls", "--wait"), ("status", "ls"), ("completion", "ksh"),
     ("show", "m", "--view", "w[x]"), ("load", "m", "--progress", "maybe"), ("explain", "--trace")],
)  # fmt: skip
def test_what_makes_no_sense_ends_with_2(no_daemon: Daemon, words: tuple[str, ...]) -> None:
    done = no_daemon.run(*words)
    assert done.returncode == USAGE
    assert done.stdout == ""
    assert done.stderr.startswith("tensord: ")
    if words:
        words = (words[0], "--json", *words[1:])
        assert one_document(no_daemon.run(*words).stdout)["error"]["code"] == "invalid_argument"


def test_version_needs_no_daemon(no_daemon: Daemon) -> None:
    version = one_document(no_daemon.run("version", "--json").stdout)["version"]
    assert no_daemon.run("version").stdout == f"tensord {version}\n"
    assert no_daemon.run("--version").stdout == f"tensord {version}\n"


@pytest.mark.parametrize("words", [("status",), ("ls",), ("stop",), ("explain",), ("pin", "1"), ("load",)])
def test_without_a_daemon_the_exit_status_is_3(
    no_daemon: Daemon, model: Path, words: tuple[str, ...]
) -> None:
    words = (*words, str(model)) if words == ("load",) else words
    done = no_daemon.run(*words)
    socket = no_daemon.runtime_folder / "socket"
    assert done.returncode == NO_DAEMON
    assert (
        done.stderr
        == f"tensord: {words[0]}: no daemon listens at {socket}; start a daemon with `tensord serve`\n"
    )
    assert one_document(no_daemon.run(*words, "--json").stdout)["error"]["code"] == "unavailable"


# ---- two programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("status",), ("load", "m"), ("--help",)])
def test_the_compiled_program_says_where_the_other_verbs_are(binary: Path, words: tuple[str, ...]) -> None:
    done = subprocess.run([binary, *words], capture_output=True, text=True, check=False)
    assert done.returncode == USAGE
    assert done.stdout == "" and "Python package" in done.stderr and done.stderr.count("\n") == 1


def test_both_programs_have_one_version(binary: Path, no_daemon: Daemon) -> None:
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == no_daemon.run("--version").stdout


@pytest.mark.parametrize("is_named", [False, True])
def test_serve_becomes_the_compiled_program(
    no_daemon: Daemon, script: Path, binary: Path, is_named: bool
) -> None:
    named = script if is_named else binary  # a script that is to run itself runs what lies beside the library
    environment = {**os.environ, **no_daemon.environment, "TENSORD_BINARY": str(named)}
    with subprocess.Popen([script, "serve", "--log-level", "off"], env=environment) as serving:
        until(no_daemon.listens, "it listens")
        assert no_daemon.ask("status")["pid"] == serving.pid
        program = Path(f"/proc/{serving.pid}/exe").resolve()
        assert program.name == "tensord" and program.read_bytes()[:4] == b"\x7fELF"
        assert no_daemon.ask("stop") == {"pid": serving.pid}
        assert serving.wait(DEADLINE_SECONDS) == DONE


def test_the_help_on_serve_tells_the_flags_that_the_compiled_program_has(binary: Path) -> None:
    done = subprocess.run([binary, "serve", "--help"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"--[a-z-]+", done.stdout)) == {flag for flag, _, _ in FLAGS}


def test_a_client_can_start_the_daemon_through_the_script(
    no_daemon: Daemon, script: Path, model: Path
) -> None:
    no_daemon.environment.update(TENSORD_AUTOSTART="1", TENSORD_BINARY=str(script))
    assert no_daemon.ask("load", str(model), "--wait")["state"] == "ready"
    assert Path(f"/proc/{no_daemon.ask('status')['pid']}/exe").resolve().read_bytes()[:4] == b"\x7fELF"


def test_a_program_that_cannot_be_run_is_named(no_daemon: Daemon, tmp_path: Path) -> None:
    no_daemon.environment["TENSORD_BINARY"] = str(tmp_path / "none")
    done = no_daemon.run("serve")
    assert done.returncode == NO_DAEMON
    assert done.stderr == f"tensord: serve: $TENSORD_BINARY names {tmp_path / 'none'}, which cannot be run\n"


def test_the_command_line_needs_neither_numpy_nor_torch() -> None:
    program = "import sys, tensord.cli; assert not {'numpy', 'torch', 'argparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_daemon_that_hangs_is_stopped_all_the_same(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    os.kill(daemon.pid, signal.SIGSTOP)
    stop = subprocess.Popen([*COMMAND, "stop"], env={**os.environ, **daemon.environment})
    try:
        until(lambda: is_pending(signal.SIGTERM, daemon.pid), "it is told to stop")
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert stop.wait(DEADLINE_SECONDS) == DONE


def is_pending(number: signal.Signals, pid: int) -> bool:
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd:")
    ]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


# ---- life of a replica -----------------------------------------------------------------------------------


def test_load_starts_a_daemon_and_stop_waits_until_it_is_gone(no_daemon: Daemon, model: Path) -> None:
    no_daemon.environment["TENSORD_AUTOSTART"] = "1"
    no_daemon.environment["TENSORD_BINARY"] = str(no_daemon.binary)
    loaded = no_daemon.ask("load", str(model), "--wait")
    assert loaded["state"] == "ready"
    pid = no_daemon.ask("status")["pid"]
    assert no_daemon.ask("stop") == {"pid": pid}
    assert not is_running(pid)
    assert no_daemon.run("status").returncode == NO_DAEMON


def is_running(pid: int) -> bool:
    """A process that nobody waited for is over as well."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_status_names_the_daemon_and_its_limits(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--host-memory", "64MiB", "--read-threads", "1")
    status = daemon.ask("status")
    assert status["pid"] == daemon.pid
    assert status["socket"] == str(daemon.runtime_folder / "socket")
    assert status["limits"]["host_memory"] == 64 << 20
    assert f"pid {daemon.pid}" in daemon.run("status").stdout


def test_a_replica_is_listed_pinned_and_evicted(daemon: Daemon, model: Path) -> None:
    loaded = daemon.ask("load", str(model), "--wait", "--pin")
    (listed,) = [one for one in daemon.ask("ls")["replicas"] if one["path"] == str(model)]
    assert listed["replica"] == loaded["replica"]
    assert listed["artifact"] == loaded["artifact"]
    assert listed["pinned"] and listed["leases"] == []
    assert str(model) in daemon.run("ls").stdout

    refused = daemon.run("evict", str(model))
    assert refused.returncode == FAILED
    assert "is pinned" in refused.stderr
    assert daemon.ask("unpin", str(loaded["replica"]))["pinned"] is False
    assert daemon.ask("evict", loaded["artifact"][:8])["replica"] == loaded["replica"]
    assert daemon.run("evict", str(model)).returncode == FAILED


def test_paths_may_be_relative(daemon: Daemon, model: Path) -> None:
    loaded = daemon.run("load", model.name, "--wait", "--json", cwd=model.parent)
    assert json.loads(loaded.stdout)["path"] == str(model)
    evicted = daemon.run("evict", f"./{model.name}", "--json", cwd=model.parent)
    assert json.loads(evicted.stdout)["path"] == str(model)


def test_a_name_is_a_path_unless_it_could_be_an_id(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file({"w": counted((3,))}, name="cafe")
    assert daemon.run("verify", "cafe", cwd=path.parent).returncode == FAILED
    assert daemon.run("verify", "./cafe", cwd=path.parent).returncode == DONE


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02\0\0\0\0\0\0\0{}trailing"])
def test_a_bad_file_ends_with_4_and_is_named(daemon: Daemon, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    done = daemon.run("load", str(path), "--wait")
    assert done.returncode == CORRUPT
    assert done.stdout == ""
    assert done.stderr.startswith("tensord: load: ") and str(path) in done.stderr


# ---- looking into checkpoints ----------------------------------------------------------------------------


def test_show_lists_tensors_and_loads_nothing(daemon: Daemon, make_shards: Callable[..., Path]) -> None:
    folder = make_shards([{"a": counted((2, 3))}, {"b": counted((4,), "int8")}])
    shown = daemon.ask("show", str(folder))
    assert [
        (one["name"], one["dtype"], one["shape"], one["size_bytes"], one["file"]) for one in shown["tensors"]
    ] == [
        ("a", "F32", [2, 3], 24, 0),
        ("b", "I8", [4], 4, 1),
    ]
    assert shown["payload_bytes"] == 28
    assert len(shown["files"]) == 2
    assert all(one["path"] != str(folder) for one in daemon.ask("ls")["replicas"])
    text = daemon.run("show", str(folder)).stdout.splitlines()
    assert text[0] == f"{folder}: 2 tensors, 28 B"
    assert text[3].split() == ["a", "F32", "[2,", "3]", "24", "B", "0"]


def test_show_prints_the_plan_of_views(daemon: Daemon, model: Path) -> None:
    shown = daemon.ask("show", str(model), "--view", "w[:, 0:3]", "--view", "b[::2]")
    items = shown["view"]["items"]
    assert [(one["tensor"], one["shape"], one["size_bytes"]) for one in items] == [
        ("w", [8, 3], 96),
        ("b", [3], 6),
    ]
    assert "8 rows x 12 B" in daemon.run("show", str(model), "--view", "w[:, 0:3]").stdout

    # The plan moves the bytes that numpy's indexing picks.
    source = model.read_bytes()
    packed = bytearray(shown["view"]["target_bytes"])
    for record in shown["view"]["records"]:
        assert record["outer"] == []
        for row in range(record["row_count"]):
            at = record["target_offset"] + row * record["target_pitch"]
            begin = record["source_offset"] + row * record["source_pitch"]
            size = record["row_bytes"]
            packed[at : at + size] = bytes(size) if record["kind"] == "fill" else source[begin : begin + size]
    w, b = counted((8, 6))[:, 0:3], counted((5,), "int16")[::2]
    assert packed[:96] == w.tobytes()
    with tensord.open(model, "np") as opened:  # as many copies as are made
        report = opened.view({"w": np.s_[:, 0:3], "b": np.s_[::2]}).load_into(
            {"w": np.empty_like(w), "b": np.empty_like(b)}
        )
    assert report.records == sum(record["kind"] == "copy" for record in shown["view"]["records"])
    assert packed[items[1]["target_offset"] :][:6] == b.tobytes()


@pytest.mark.parametrize("view", ["w[8]", "w[0, 0, 0]", "nobody"])
def test_show_refuses_views_that_do_not_fit(daemon: Daemon, model: Path, view: str) -> None:
    done = daemon.run("show", str(model), "--view", view)
    assert done.returncode == FAILED
    assert done.stderr.startswith("tensord: show: ")


def test_verify_loads_what_is_not_resident(daemon: Daemon, model: Path) -> None:
    report = daemon.ask("verify", str(model))
    assert report["faults"] == [] and report["path"] == str(model)
    assert daemon.ask("verify", str(report["replica"]))["artifact"] == report["artifact"]
    assert "sound" in daemon.run("verify", str(model)).stdout


def test_one_replica_of_two_names_is_listed_by_both(daemon: Daemon, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "another-name.safetensors"
    other.symlink_to(model)
    daemon.run("load", str(model), "--wait")
    daemon.run("load", str(other), "--wait")
    (listed,) = [one for one in daemon.ask("ls")["replicas"] if one["path"] == str(model)]
    assert listed["paths"] == [str(model), str(other)]
    shown = [line.split()[-1] for line in daemon.run("ls").stdout.splitlines()]
    assert shown.index(str(other)) == shown.index(str(model)) + 1
    assert daemon.ask("explain", str(other))["replica"] == listed["replica"]


def test_explain_tells_phases_and_advice(daemon: Daemon, model: Path) -> None:
    daemon.ask("load", str(model), "--wait")
    report = daemon.ask("explain", str(model))
    assert [phase["name"] for phase in report["phases"]][:5] == [
        "index",
        "wait_for_memory",
        "touch",
        "read",
        "check",
    ]
    assert daemon.ask("explain")["load"] >= report["load"]
    text = daemon.run("explain", "last").stdout
    assert "phase" in text and "limited by" in text


def test_explain_writes_a_chrome_trace(
    make_daemon: Callable[..., Daemon], model: Path, tmp_path: Path
) -> None:
    daemon = make_daemon("--log-level", "debug")
    daemon.ask("load", str(model), "--wait")
    trace = tmp_path / "trace.json"
    report = daemon.ask("explain", "last", "--trace", str(trace))
    assert report["trace_file"] == str(trace) and "trace" not in report
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"read", "check"} <= {span["name"] for span in spans}
    assert all(span["dur"] >= 0 for span in spans)
    assert {event["tid"] for event in events if event["ph"] == "M"} == {span["tid"] for span in spans}


def test_a_daemon_that_keeps_no_trace_says_how_to_get_one(
    daemon: Daemon, model: Path, tmp_path: Path
) -> None:
    daemon.ask("load", str(model), "--wait")
    done = daemon.run("explain", str(model), "--trace", str(tmp_path / "trace.json"))
    assert done.returncode == FAILED
    assert "--log-level debug" in done.stderr


# ---- waiting in front of someone -------------------------------------------------------------------------


def test_progress_is_shown_when_asked_for_and_on_terminals(daemon: Daemon, model: Path) -> None:
    assert daemon.run("load", str(model), "--wait").stderr == ""
    shown = daemon.run("load", str(model), "--wait", "--progress", "always").stderr
    assert "100 %" in shown and shown.endswith("\n")
    assert "100 %" in terminal_output(daemon, "load", str(model), "--wait")
    assert terminal_output(daemon, "load", str(model), "--wait", "--progress", "never") == ""


def terminal_output(daemon: Daemon, *words: str) -> str:
    """What a run writes to standard error when that is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, **daemon.environment}
    command = [*COMMAND, *words]
    subprocess.run(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    os.set_blocking(ours, False)
    try:
        shown = os.read(ours, 1 << 16)
    except BlockingIOError:
        shown = b""
    os.close(theirs)
    os.close(ours)
    return shown.decode()


def test_interrupting_a_wait_leaves_the_daemon_filling(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = make_daemon("--read-threads", "1", "--host-memory", "3GiB")
    path = tmp_path / "large.safetensors"
    header = json.dumps({"w": {"dtype": "U8", "shape": [2 << 30], "data_offsets": [0, 2 << 30]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (2 << 30))

    words = [*COMMAND, "load", str(path), "--wait", "--progress", "always"]
    waiting = subprocess.Popen(words, env={**os.environ, **daemon.environment}, stderr=subprocess.PIPE)
    assert waiting.stderr is not None
    while b"%" not in waiting.stderr.read1():  # type: ignore[attr-defined]
        assert waiting.poll() is None
    os.kill(daemon.pid, signal.SIGSTOP)  # so that the load cannot win the race
    try:
        waiting.send_signal(signal.SIGINT)
        _, rest = waiting.communicate(timeout=DEADLINE_SECONDS)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    if waiting.returncode == DONE:
        pytest.skip("the load was over before it could be interrupted")
    assert waiting.returncode == INTERRUPTED
    assert rest.decode().endswith("goes on filling it\n")
    assert daemon.ask("load", str(path), "--wait")["state"] == "ready"


# ---- completion ------------------------------------------------------------------------------------------


@pytest.fixture
def complete(no_daemon: Daemon, script: Path) -> Callable[..., list[str]]:
    """What bash would offer for the last word: ``complete("load", "--")``."""
    return lambda *words, cwd=None: completed(no_daemon, script, words, cwd)


def completed(daemon: Daemon, command: Path, words: tuple[str, ...], cwd: Path | None) -> list[str]:
    program = """
        source <(tensord completion bash)
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        $(complete -p tensord | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{command.parent}:{os.environ['PATH']}"
    environment = {**os.environ, **daemon.environment, "PATH": path}
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", "tensord", *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_bash_completes_verbs_flags_values_and_files(
    complete: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "with space.safetensors").touch()
    assert set(VERBS) <= set(complete(""))
    assert complete("un") == ["unpin"]
    assert set(complete("load", "--")) == {
        "--wait",
        "--pin",
        "--only",
        "--device",
        "--progress",
        "--json",
        "--help",
    }
    assert complete("load", "--progress", "a") == ["auto", "always"]
    assert complete("load", "--wait", "wi", cwd=tmp_path) == ["with space.safetensors"]
    assert complete("completion", "f") == ["fish"]
    assert "--host-memory" in complete("serve", "--host")
    assert complete("ls", "x") == [""]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_accept_their_script(no_daemon: Daemon, shell: str, tmp_path: Path) -> None:
    script = no_daemon.run("completion", shell).stdout
    assert one_document(no_daemon.run("completion", shell, "--json").stdout)["script"] == script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run([shell, "-n", str(path)], check=True, timeout=DEADLINE_SECONDS)


# ---- output ----------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written_is_an_error(no_daemon: Daemon) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "version"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == FAILED
    assert b"standard output" in done.stderr


def test_names_from_files_do_not_reach_the_terminal_raw(
    daemon: Daemon, make_file: Callable[..., Path]
) -> None:
    path = make_file({"w\x1b[2J": np.zeros(1, np.float32)})
    shown = daemon.run("show", str(path)).stdout
    assert "\x1b" not in shown
    assert daemon.ask("show", str(path))["tensors"][0]["name"] == "w\x1b[2J"
