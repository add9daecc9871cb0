"""The verbs: what the command line accepts, its help, and the shells' completions all come from one table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from .. import __version__, explaining
from ..errors import Error, InvalidArgumentError, NotFoundError
from . import completion, daemon, doctor, explain, parity, reports, selecting, serve, show, top
from .checkpoint import Checkpoint, check_view, open_resident
from .output import CORRUPT, DONE, Output, document, os_error
from .table import quoted
from .watch import watch_fill
from .words import Given, Verb, Word, help_on, help_on_all

# Replica numbers, artifact ids (4 digits or more) and `last` are themselves; everything else is a path. A
# file with such a name is written ./1234.
_NO_PATH = re.compile(r"last|[0-9]+|[0-9a-f]{4,32}")


def is_path(word: str) -> bool:
    return _NO_PATH.fullmatch(word) is None


def absolute(word: str) -> str:
    """As clients name what they open, so that one checkpoint has one name: symbolic links stay, unless ``..``
    must be followed."""
    if not word:
        return word
    try:
        path = os.path.join(os.getcwd(), word)  # noqa: PTH118, PTH109
    except OSError:
        return word
    if ".." in path.split("/"):
        return os.path.realpath(path)
    return "/" + os.path.normpath(path).lstrip("/")


def _selected(word: str, of: Callable[[reports.Report, str], int] = selecting.replica_of) -> str:
    """The number of a replica, as the daemon takes it."""
    selector = absolute(word) if is_path(word) else word
    return str(reports.read_report(daemon.ask("list"), lambda listed: of(listed, selector)))


# ---- what they do ------------------------------------------------------------------------------------------


def _status(_: Given) -> Output:
    listed = reports.read_report(daemon.ask("list"), dict)
    report = document(
        reports.read_report(daemon.ask("status"), lambda status: reports.status_of(status, listed))
    )
    return Output(report, reports.status_text(report))


def _ls(_: Given) -> Output:
    report = daemon.ask("list")
    return Output(report, reports.list_text(report))


def _stop(_: Given) -> Output:
    pid = daemon.stop()
    return Output(document({"pid": pid}), f"stopped daemon {pid}\n")


def _device_named(word: str) -> str:
    """As ``open(device=)`` takes it; empty: host memory."""
    from ..opening import device_name  # numpy comes with it

    return device_name(int(word) if word.isdecimal() else word) or ""


def _load(given: Given) -> Output:
    device = _device_named(given.device) if given.device else ""
    with open_resident(absolute(given.operand), given.only, device) as checkpoint:
        if given.pin:
            daemon.ask("pin", str(checkpoint.info()["replica"]))
        if given.wait:
            watch_fill(checkpoint, given.progress)
        info = checkpoint.info_json()
    return Output(info, reports.load_text(info))


def _show(given: Given) -> Output:
    with Checkpoint(absolute(given.operand), given.only, is_index_only=True) as checkpoint:
        plan, tensors = checkpoint.plan(given.view), checkpoint.tensors()
        if given.view:
            return show.show_views(checkpoint.path, tensors, plan)
        return show.show_index(checkpoint.path, plan["files"], tensors, checkpoint.metadata())


def _verify(given: Given) -> Output:
    report = _verified(given)
    verified = reports.verify_text(report)
    return Output(report, verified.text, DONE if verified.is_sound else CORRUPT)


def _verified(given: Given) -> str:
    """A path is opened first: that makes it resident, and notices when its files have changed since. What
    cannot be opened any more may still be resident."""
    if not is_path(given.operand):
        return daemon.ask("verify", _selected(given.operand))
    path = absolute(given.operand)
    try:
        checkpoint = open_resident(path)
    except NotFoundError as missing:
        try:
            return daemon.ask("verify", _selected(path))
        except Error:
            raise missing from None
    with checkpoint:
        watch_fill(checkpoint, given.progress)
        return daemon.ask("verify", str(checkpoint.info()["replica"]))


def _explain(given: Given) -> Output:
    facts = daemon.ask("explain", _selected(given.operand or "last", selecting.load_of))
    rates = doctor.kept_rates(reports.read_report(daemon.ask("status"), dict))
    report = document(reports.read_report(facts, lambda read: explaining.explain({**read, "rates": rates})))
    text = explain.explain_text(report)
    if given.trace:
        _write_file(given.trace, explain.chrome_trace(report))
        report = explain.without_trace(report, absolute(given.trace))
        text += f"\ntrace in {given.trace}; ui.perfetto.dev and chrome://tracing show it\n"
    if given.html:
        _write_file(given.html, explain.explain_page(report))
        text += f"\npicture in {given.html}; any browser shows it\n"
    return Output(report, text)


def _write_file(path: str, content: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        raise os_error(f"write {path}", error) from None


def _doctor(given: Given) -> Output:
    return doctor.examine(given.operand)


def _top(given: Given) -> Output:
    interval_s = 1.0 if given.interval is None else given.interval
    return top.watch(interval_s, given.count, given.json)


def _parity(given: Given) -> Output:
    return parity.examine(given.operand, absolute(given.model), given.tp or 1)


def _evict(given: Given) -> Output:
    return _on_replica("evict", "evicted", given)


def _pin(given: Given) -> Output:
    return _on_replica("pin", "pinned", given)


def _unpin(given: Given) -> Output:
    return _on_replica("unpin", "unpinned", given)


def _on_replica(verb: str, done: str, given: Given) -> Output:
    report = daemon.ask(verb, _selected(given.operand))
    return Output(report, reports.replica_text(done, report))


def _version(_: Given) -> Output:
    return Output(document({"version": __version__}), version_text())


def version_text() -> str:
    return f"tensord {__version__}\n"


def _completion(given: Given) -> Output:
    script = completion.SCRIPTS[given.operand]
    return Output(document({"shell": given.operand, "script": script}), script)


def _help(given: Given) -> Output:
    asked = find(given.operand)
    if asked is None and given.operand:
        raise InvalidArgumentError(f"there is no verb {quoted(given.operand)}; `tensord help` lists all")
    described = [
        {"name": verb.name, "summary": verb.summary, "example": verb.example}
        for verb in VERBS
        if asked is None or verb is asked
    ]
    return Output(document({"verbs": described}), help_on_all(VERBS) if asked is None else help_text(asked))


def help_text(verb: Verb) -> str:
    return serve.serve_help() if verb.name == "serve" else help_on(verb)


def _keep(_: Given) -> Output:
    from .. import keeper

    daemon.socket_path()  # the keeper's name is as long
    try:
        keeper.keep(daemon.runtime_folder())
    except Error:
        raise  # some are OSErrors too
    except OSError as error:
        raise os_error(f"keep in {daemon.runtime_folder()}", error) from None
    return Output(document({"pid": os.getpid()}), "")


def _serve(_: Given) -> Output:
    raise InvalidArgumentError("serve must be the first word")  # then the daemon's program reads the others


# ---- what they take ----------------------------------------------------------------------------------------


def _interval(text: str) -> float:
    least, most = 0.001, 1000.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not least <= seconds <= most:
        raise ValueError(f"Value {text} not in range {least:.6f} to {most:.6f}")
    return seconds


def _count(text: str) -> int:
    most = 2**64 - 1
    count = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= count <= most:
        raise ValueError(f"Value {text} not in range 1 to {most}")
    return count


_PATH = Word("PATH", "a .safetensors file, or a folder with a checkpoint", is_required=True)
_REPLICA = Word("REPLICA", "a path, an artifact id (4 digits or more), a replica's number", is_required=True)
_LOAD = Word("LOAD", "a path, an artifact id, a replica's number, or last (the default)")
_FOLDER = Word("FOLDER", "whose disk is measured (default: the state folder), or a file")
_SHELL = Word("SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish"), is_required=True)
_VERB = Word("VERB", "any of them")
_ONLY = Word(
    "--only",
    "only tensors of this name, or that match; may be given many times",
    "PATTERN",
    is_repeated=True,
)
_VIEW = Word(
    "--view",
    "print the plan that packs such slices; may be given many times",
    "VIEW",
    read=check_view,
    is_repeated=True,
)
_DEVICE = Word("--device", "into the memory of a GPU: cuda:0, or a UUID", "DEVICE")
_WAIT = Word("--wait", "return when every byte is there and checked")
_PIN = Word("--pin", "keep it until it is unpinned")
_PROGRESS = Word(
    "--progress",
    "show how far it is: auto (on a terminal), always, never",
    "WHEN",
    choices=("auto", "always", "never"),
)
_TRACE = Word("--trace", "write every read, check and copy to FILE, for chrome://tracing", "FILE")
_HTML = Word("--html", "draw it in FILE, a page for any browser", "FILE")
_INTERVAL = Word(
    "--interval",
    "time between two looks (1)",
    "SECONDS",
    kind="FLOAT:FLOAT in [0.001 - 1000]",
    read=_interval,
)
_COUNT = Word(
    "--count",
    "end after so many looks",
    "COUNT",
    kind="UINT:UINT in [1 - 18446744073709551615]",
    read=_count,
)
_ENGINE = Word("ENGINE", ", ".join(parity.ENGINES), choices=parity.ENGINES, is_required=True)
_MODEL = Word("MODEL", "a folder with a checkpoint, or for torch a file too", is_required=True)
_TP = Word(
    "--tp",
    "how many ranks of tensor parallelism (1)",
    "N",
    kind="UINT:UINT in [1 - 18446744073709551615]",
    read=_count,
)

VERBS = (
    Verb("serve", "run the daemon in the foreground", "tensord serve --host-memory 64GiB", _serve),
    Verb(
        "keep",
        "hold what is in memory while the daemon is stopped, killed or replaced",
        "tensord keep &  # then `tensord stop; tensord serve` reads nothing again",
        _keep,
    ),
    Verb("stop", "stop the daemon and wait until it is gone", "tensord stop", _stop),
    Verb("status", "say which daemon runs, and its limits", "tensord status --json", _status),
    Verb(
        "load",
        "load a checkpoint into memory",
        "tensord load /models/Qwen3-14B --wait --pin",
        _load,
        (_PATH, _ONLY, _DEVICE, _WAIT, _PIN, _PROGRESS),
    ),
    Verb("ls", "list what is in memory and who holds it", "tensord ls", _ls),
    Verb(
        "show",
        "list the tensors of a checkpoint, or plan a view",
        "tensord show /models/Qwen3-14B --view 'lm_head.weight[:, 0:2560]'",
        _show,
        (_PATH, _ONLY, _VIEW),
    ),
    Verb(
        "verify",
        "check every block against its digest",
        "tensord verify /models/Qwen3-14B",
        _verify,
        (_REPLICA, _PROGRESS),
    ),
    Verb(
        "explain",
        "say where the time of a load went",
        "tensord explain last --html load.html",
        _explain,
        (_LOAD, _TRACE, _HTML),
    ),
    Verb(
        "doctor",
        "measure this machine and say what could be better",
        "tensord doctor /models",
        _doctor,
        (_FOLDER,),
    ),
    Verb(
        "top",
        "watch loads, replicas, memory and rates",
        "tensord top --interval 0.5",
        _top,
        (_INTERVAL, _COUNT),
    ),
    Verb(
        "parity",
        "load a model by its engine's loader and by tensord, and compare every bit",
        "tensord parity vllm /models/Qwen3-14B --tp 2",
        _parity,
        (_ENGINE, _MODEL, _TP),
    ),
    Verb(
        "evict",
        "give back the memory of a replica that nobody holds",
        "tensord evict /models/Qwen3-14B",
        _evict,
        (_REPLICA,),
    ),
    Verb("pin", "keep a replica in memory", "tensord pin /models/Qwen3-14B", _pin, (_REPLICA,)),
    Verb("unpin", "let a replica be evicted again", "tensord unpin /models/Qwen3-14B", _unpin, (_REPLICA,)),
    Verb("version", "print the version", "tensord version", _version),
    Verb(
        "completion",
        "print a script that completes words in a shell",
        "source <(tensord completion bash)",
        _completion,
        (_SHELL,),
    ),
    Verb("help", "print help on a verb", "tensord help load", _help, (_VERB,)),
)


def find(name: str) -> Verb | None:
    return next((verb for verb in VERBS if verb.name == name), None)
