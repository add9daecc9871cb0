"""Which replica, or which load, a word of the command line means. Pure: what `list` tells in, numbers out."""

from __future__ import annotations

import os

from ..errors import Error, InvalidArgumentError, NotFoundError
from .reports import Report, entries, number, text
from .table import quoted

_ID_DIGITS_MIN = 4


def replica_of(listed: Report, word: str) -> int:
    """`word`: a path, an artifact id (or its beginning, 4 digits at least), a replica's number, or ``last``:
    what was opened last.

    Raises
    ------
    NotFoundError
    InvalidArgumentError
        It stands for several replicas.
    """
    wanted = str(number(listed, "last")) if word == "last" else word
    # Without files: one on a device, whose source is not there yet.
    replicas = [replica for replica in entries(listed, "replicas") if "files" in replica]
    for replica in replicas:
        if str(number(replica, "replica")) == wanted:
            return number(replica, "replica")
    found = [replica for replica in replicas if _is_named(replica, word)]
    # A path means the copy in host memory, where there is one; others have numbers.
    found = [replica for replica in found if replica["device"] is None] or found
    if not found:
        raise NotFoundError(f"no replica of {quoted(word)} is resident; `tensord ls` lists them")
    if len({text(replica, "path") for replica in found}) > 1:
        raise InvalidArgumentError(
            f"{quoted(word)} stands for {len(found)} replicas; use a replica's number from `tensord ls`"
        )
    # Of one path there may be an old and a new replica when its files changed: the newest is meant,
    # and before a selection of its tensors a whole one.
    whole = [replica for replica in found if replica["only"] is None]
    return number((whole or found)[-1], "replica")


def _shown(word: str) -> str:
    """As the daemon's JSON has a path of any bytes."""
    return os.fsencode(word).decode("utf-8", "replace")


def _is_named(replica: Report, word: str) -> bool:
    path = _shown(word)
    if path in replica["paths"] or replica["files"] == [path]:
        return True
    return len(word) >= _ID_DIGITS_MIN and (replica["artifact"] or "").startswith(word)


def load_of(listed: Report, word: str) -> int:
    """The replica that a load made or was to make: as `replica_of`, and of what is gone, failed or waits, by
    path and number. ``last`` is the newest of all where nothing is known of what was opened last.

    Raises
    ------
    NotFoundError, InvalidArgumentError
    """
    try:
        return replica_of(listed, word)
    except Error:
        loads = entries(listed, "loads")
        wanted = str(number(listed, "last")) if word == "last" else _shown(word)
        meant = [load for load in loads if wanted in (text(load, "path"), str(number(load, "replica")))]
        if word == "last":
            meant = meant or loads
        if not meant:
            raise
        return number(meant[-1], "replica")
