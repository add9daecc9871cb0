"""The keeper: holds descriptors of replicas, and what the daemon says of them, for the next daemon.

frame   [u32 "TSD1"][u32 size][u32 fd_count][u32 0] [u64 replica][u64 lease] [opaque bytes]

    with bytes       is stored in place of what was there
    without          what is stored goes; of lease 0 the replica with all its leases
    of replica 0     all that is stored comes back, replicas before their leases; then this frame

It never looks into the bytes, and maps nothing. Memory lasts as long as a descriptor of it is held here: to
free what a dead daemon left, end the keeper. One daemon is served at a time. The one that came last counts:
what the one before it has sent is taken first.
"""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import signal
import socket
import stat
import struct
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .errors import DeniedError, UnavailableError

MAGIC = 0x31445354
FRAME_BYTES_MAX = 64 << 20
FRAME_FDS_MAX = 2048
STORED_BYTES_MAX = 1 << 30
REPLICA_COUNT_MAX = 10_000
FDS_PER_MESSAGE = 250  # below the kernel's SCM_MAX_FD, 253
SPARE_FDS = 64  # what is left of ulimit -n for all but what is stored
SEND_SECONDS = 10.0

_HEADER = struct.Struct("<IIII")
_HEAD = struct.Struct("<QQ")
_CREDENTIALS = struct.Struct("3i")


class Refused(Exception):
    """What a daemon sent makes no sense, or is too much: its connection is closed."""


class Item(NamedTuple):
    content: bytes  # the frame without its header
    fds: tuple[int, ...]


class Store:
    """What is kept. Every descriptor in it is its own."""

    def __init__(self, fds_max: int) -> None:
        self._replicas: dict[int, dict[int, Item]] = {}
        self._bytes = 0
        self._fds = 0
        self._fds_max = fds_max

    def put(self, replica: int, lease: int, item: Item) -> None:
        """Takes the item's descriptors, also where it raises Refused."""
        self._drop_item(replica, lease)
        is_full = (
            len(self._replicas) >= REPLICA_COUNT_MAX and replica not in self._replicas
        ) or self._bytes + len(item.content) > STORED_BYTES_MAX
        if is_full or self._fds + len(item.fds) > self._fds_max:
            close_all(item.fds)
            raise Refused("it wants more to be kept than there is room for (ulimit -n?)")
        self._replicas.setdefault(replica, {})[lease] = item
        self._bytes += len(item.content)
        self._fds += len(item.fds)

    def drop(self, replica: int, lease: int) -> None:
        for one in [lease] if lease else list(self._replicas.get(replica, ())):
            self._drop_item(replica, one)

    def clear(self) -> None:
        for replica in list(self._replicas):
            self.drop(replica, 0)

    def items(self) -> list[Item]:
        """Replicas before their leases."""
        return [items[lease] for _, items in sorted(self._replicas.items()) for lease in sorted(items)]

    def _drop_item(self, replica: int, lease: int) -> None:
        items = self._replicas.get(replica, {})
        gone = items.pop(lease, None)
        if gone is not None:
            close_all(gone.fds)
            self._bytes -= len(gone.content)
            self._fds -= len(gone.fds)
        if not items:
            self._replicas.pop(replica, None)


def close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


class Connection:
    """One daemon."""

    def __init__(self, peer: socket.socket, store: Store) -> None:
        self.peer = peer
        peer.setblocking(False)
        self._store = store
        self._bytes = bytearray()
        self._begin = 0  # of `_bytes`, in the stream
        # The kernel ends a read behind the bytes that descriptors came with: where that was in the stream.
        self._fds: deque[tuple[int, int]] = deque()

    def receive(self) -> bool:
        """Takes what has come. False when nothing has. Raises Refused, OSError, EOFError."""
        try:
            data, fds, told, _ = socket.recv_fds(
                self.peer, 1 << 18, FDS_PER_MESSAGE + 3, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        self._bytes += data
        end = self._begin + len(self._bytes)
        self._fds.extend((end, fd) for fd in fds)
        if told & socket.MSG_CTRUNC:
            raise Refused("descriptors were lost: this process may open no more files (ulimit -n)")
        if len(self._fds) > FRAME_FDS_MAX:
            raise Refused("too many descriptors came with one frame")
        if not data:
            raise EOFError
        while self._take_frame():
            pass
        return True

    def _take_frame(self) -> bool:
        if len(self._bytes) < _HEADER.size:
            return False
        magic, size, fd_count, zero = _HEADER.unpack_from(self._bytes)
        is_sane = magic == MAGIC and zero == 0 and _HEAD.size <= size <= FRAME_BYTES_MAX
        if not is_sane or fd_count > FRAME_FDS_MAX:
            raise Refused("these bytes are no frame")
        final = _HEADER.size + size
        if len(self._bytes) < final:
            return False
        content = bytes(self._bytes[_HEADER.size : final])
        del self._bytes[:final]
        self._begin += final
        fds = []
        while self._fds and self._fds[0][0] <= self._begin:
            fds.append(self._fds.popleft()[1])
        if len(fds) != fd_count:
            close_all(tuple(fds))
            raise Refused("a frame has other descriptors than it says")
        self._obey(Item(content, tuple(fds)))
        return True

    def _obey(self, item: Item) -> None:
        replica, lease = _HEAD.unpack_from(item.content)
        if replica > 0 and len(item.content) > _HEAD.size:
            return self._store.put(replica, lease, item)
        close_all(item.fds)
        if item.fds or len(item.content) != _HEAD.size or (replica == 0 and lease != 0):
            raise Refused("it says nothing that a keeper knows")
        if replica == 0:
            return self._give_back(item)
        return self._store.drop(replica, lease)

    def _give_back(self, end: Item) -> None:
        self.peer.settimeout(SEND_SECONDS)
        for item in [*self._store.items(), end]:
            header = _HEADER.pack(MAGIC, len(item.content), len(item.fds), 0)
            rest = header + item.content
            for at in range(0, len(item.fds), FDS_PER_MESSAGE):
                # Each on a byte of the header.
                socket.send_fds(self.peer, [rest[:1]], item.fds[at : at + FDS_PER_MESSAGE])
                rest = rest[1:]
            self.peer.sendall(rest)
        self.peer.setblocking(False)

    def close(self) -> None:
        close_all(tuple(fd for _, fd in self._fds))
        self._fds.clear()
        self.peer.close()


def say(text: str) -> None:
    with suppress(OSError):
        print(f"tensord keep: {text}", file=sys.stderr, flush=True)


class Keeper:
    """Listens at FOLDER/keeper."""

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise DeniedError(f"runtime folder {folder} is not yours alone; set TENSORD_RUNTIME_DIR")
        self._lock = os.open(
            path / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(f"a keeper already runs for {folder}") from None
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.path = path / "keeper"
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        os.fchmod(self._listener.fileno(), 0o600)  # as the file then has it: it is never open to others
        self._listener.bind(str(self.path))
        self._listener.listen(4)
        self._store = Store(most - SPARE_FDS)
        self._connection: Connection | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve_once(self) -> None:
        """Waits for something to come, and takes it."""
        for key, _ in self._selector.select():
            if key.fileobj is self._listener:
                self._accept()
            elif self._connection is not None and key.fileobj is self._connection.peer:
                self._receive(self._connection)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        if uid != os.geteuid():
            say(f"process {pid} of uid {uid} is not served")
            peer.close()
            return
        while self._connection is not None and self._receive(self._connection):
            pass
        self._leave()
        self._connection = Connection(peer, self._store)
        self._selector.register(peer, selectors.EVENT_READ)

    def _receive(self, connection: Connection) -> bool:
        try:
            return connection.receive()
        except Refused as why:
            say(f"the connection is closed: {why}")
        except (EOFError, OSError):
            pass
        self._leave()
        return False

    def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._selector.unregister(connection.peer)
            connection.close()

    def close(self) -> None:
        self._leave()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        self._store.clear()


def keep(folder: str) -> None:
    """Serves until SIGTERM or SIGINT; then all that no daemon or client holds is freed."""
    keeper = Keeper(folder)
    signal.signal(
        signal.SIGPIPE, signal.SIG_IGN
    )  # a daemon that dies while it is given all is no reason to end
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in the background of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        say(f"listens at {keeper.path}, pid {os.getpid()}")
        while True:
            keeper.serve_once()
    except KeyboardInterrupt:
        keeper.close()
