"""The daemon's answers (docs/PROTOCOL.md, Reports) as text for people. Pure: documents in, text out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..errors import Error, InternalError
from .table import Table, counted, duration_text, quoted, rate_text, seconds_text, size_text

Report = dict[str, Any]
Told = TypeVar("Told")


def read_report(report: str, tell: Callable[[Report], Told]) -> Told:
    """What `tell` makes of a document.

    Raises
    ------
    InternalError
        It is not what PROTOCOL.md says: no JSON, a field missing or of another type.
    """
    try:
        return tell(json.loads(report))
    except Error:
        raise  # some are ValueErrors too
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InternalError(f"the daemon's answer cannot be read: {type(error).__name__}: {error}") from None


# ---- fields: a document is checked where it is read --------------------------------------------------------


def number(value: Report, name: str) -> int:
    return int(_of_type(value[name], name, int))


def fraction(value: Report, name: str) -> float:
    return float(_of_type(value[name], name, (int, float)))


def text(value: Report, name: str) -> str:
    return str(_of_type(value[name], name, str))


def entries(value: Report, name: str) -> list[Report]:
    return list(_of_type(value[name], name, list))


def _of_type(value: Any, name: str, kind: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {type(value).__name__}")
    return value


def size(value: Report, name: str) -> str:
    return size_text(number(value, name))


# ---- status ------------------------------------------------------------------------------------------------


def status_of(status: Report, listed: Report) -> Report:
    """The answer to `status`, with what `list` tells of GPU memory and of who waits for room."""
    replicas = entries(listed, "replicas")
    gpus: Counter[str] = Counter()
    for replica in replicas:
        if replica.get("device") is not None:
            gpus[text(replica, "device")] += number(replica, "memory_bytes")
    waiting = [
        {**waiter, "path": text(replica, "path"), "waits_for": text(replica, "waits_for")}
        for replica in replicas
        if replica["state"] == "waiting"
        for waiter in entries(replica, "waiters")
    ]
    return {**status, "gpus": gpus, "waiting": waiting}


def status_text(report: str) -> str:
    return read_report(report, _status)


def _status(status: Report) -> str:
    limits, memory = status["limits"], status["memory"]
    waiting = "".join(
        f"waiting   pid {number(one, 'pid')}, {text(one, 'path')}: {text(one, 'waits_for')}\n"
        for one in entries(status, "waiting")
    )
    limit = limits.get("gpu_memory", 0)
    gpus = "".join(
        f"gpu       {device}: {size_text(used)}{f' of {size_text(limit)}' if limit else ''} in use\n"
        for device, used in status.get("gpus", {}).items()
    )
    in_use = f"{size(memory, 'in_use')} of {size(limits, 'host_memory')} in use"
    running = counted(number(status, "loads_running"), "load")
    return (
        f"daemon    pid {number(status, 'pid')}, tensord {text(status, 'version')}, "
        f"up {seconds_text(fraction(status, 'uptime_s'))}\n"
        f"socket    {text(status, 'socket')}\n"
        f"state     {text(status, 'state_dir')}\n"
        f"memory    {in_use}, {size(memory, 'kept')} kept for the next load\n"
        f"{gpus}"
        f"replicas  {number(status, 'replicas')}, {running} running\n"
        f"reading   {counted(number(limits, 'read_threads'), 'thread')}\n"
        f"clients   {counted(number(status, 'connections'), 'connection')}\n"
        f"{waiting}"
    )


# ---- replicas ----------------------------------------------------------------------------------------------


def list_text(report: str) -> str:
    return read_report(report, list_of)


def list_of(listed: Report) -> str:
    replicas = entries(listed, "replicas")
    if not replicas:
        return "nothing is resident; `tensord load PATH` loads a checkpoint\n"
    table = Table(">replica", "state", ">size", ">tensors", "artifact", "held by", "path")
    errors = ""
    for replica in replicas:
        table.add(
            str(number(replica, "replica")),
            _state_of(replica),
            size_text(replica.get("payload_bytes", 0)),
            tensors_of(replica),
            (replica["artifact"] or "-")[:12],
            _holders_of(replica),
            text(replica, "path") + (f" on {replica['device']}" if replica.get("device") else ""),
        )
        for path in replica.get("paths", [])[1:]:  # the same files, opened by other names
            table.add("", "", "", "", "", "", str(path))
        error = replica["error"]
        if error is not None:
            errors += f"replica {number(replica, 'replica')} failed: {text(error, 'message')}\n"
    return table.text() + errors


def tensors_of(value: Report) -> str:
    """``12``, or ``12 of 443`` where only some of the files' were asked for."""
    count = value.get("tensor_count", 0)
    whole = value.get("whole_tensor_count", count)
    return str(count) if value.get("only") is None else f"{count} of {whole}"


def _state_of(replica: Report) -> str:
    state = text(replica, "state")
    total = replica.get("total_bytes", 0)
    if state != "filling" or not total:
        return state
    return f"{state} {replica.get('ready_bytes', 0) * 100 // total} %"


def _holders_of(replica: Report) -> str:
    leases = Counter(
        f"{lease['name'] or '?'} {number(lease, 'pid')}" for lease in entries(replica, "leases")
    )  # one process may hold several
    holders = [process + (f" ({count})" if count > 1 else "") for process, count in sorted(leases.items())]
    if replica["pinned"]:
        holders.insert(0, "pinned")
    return ", ".join(holders) or f"- (idle {seconds_text(fraction(replica, 'idle_s'))})"


def replica_text(done: str, report: str) -> str:
    """``evicted`` ... -> ``evicted replica 1 (/models/a, 2.00 GiB)``"""
    return read_report(
        report,
        lambda replica: (
            f"{done} replica {number(replica, 'replica')} "
            f"({text(replica, 'path')}, {size(replica, 'memory_bytes')})\n"
        ),
    )


def load_text(info: str) -> str:
    """What tensord_info says of a load."""
    return read_report(info, _load)


def _load(model: Report) -> str:
    tensors = counted(number(model, "tensor_count"), "tensor")
    if text(model, "state") == "ready":
        rest = f", artifact {model['artifact'] or '-'}"
    else:
        rest = " (filling; `tensord load --wait` watches it)"
    where = " on a GPU" if model.get("on_device") else ""
    return (
        f"{text(model, 'path')}{where}: {size(model, 'payload_bytes')} in {tensors}, "
        f"replica {number(model, 'replica')}{rest}\n"
    )


# ---- verify ------------------------------------------------------------------------------------------------


class Verified(NamedTuple):
    text: str
    is_sound: bool  # every leaf is what its digest says


def verify_text(report: str) -> Verified:
    return read_report(report, _verified)


def _verified(report: Report) -> Verified:
    faults = entries(report, "faults")
    count, ns = number(report, "bytes"), number(report, "ns")
    lines = [
        f"{text(fault, 'file')}: tensor {quoted(text(fault, 'tensor'))}, block {number(fault, 'leaf')} "
        f"({number(fault, 'size_bytes')} B at {number(fault, 'offset')}): not what was loaded first\n"
        for fault in faults
    ]
    verdict = counted(len(faults), "corrupt block") if faults else "sound"
    rate = f", {rate_text(count / ns) if ns > 0 else ''} GB/s" if count else ""
    lines.append(
        f"{text(report, 'path')}: {verdict}; {number(report, 'leaf_count')} blocks, "
        f"{size_text(count)} checked in {duration_text(ns)}{rate}\n"
    )
    return Verified("".join(lines), not faults)
