"""The socket's other end is not to be trusted: bytes, descriptors, versions and users it should refuse."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import COMMAND, DEADLINE_SECONDS, Daemon, counted, safetensors_bytes
from processes import status_kib, until

NOBODY = 65534
HEADER = struct.Struct("<4sIII")
OPENED, REPORT, FAILURE = 1, 2, 3
INVALID_ARGUMENT, CHANGED, DENIED, UNSUPPORTED = 2, 7, 8, 9
MIB = 1 << 20


@pytest.fixture(autouse=True)
def it_lives_on(daemon: Daemon, make_file: Callable[..., Path]) -> Iterator[None]:
    """Whatever a test does to it, the same daemon serves afterwards, with the descriptors it had before."""
    daemon.ask("load", str(make_file({"w": counted((2,))}, name="first.safetensors")), "--wait")
    evict_all(daemon)
    # The last connection of these commands may still be closing: only the listening socket is to be left.
    until(lambda: open_files(daemon).count("socket") == 1, "only the daemon's own socket is open")
    before = open_files(daemon)
    yield
    assert daemon.ask("status")["pid"] == daemon.pid, daemon.log()
    evict_all(daemon)
    until(lambda: open_files(daemon) == before, f"the open files are {before}")


def evict_all(daemon: Daemon) -> None:
    for replica in daemon.ask("ls")["replicas"]:
        selector = str(replica["replica"])
        until(lambda: daemon.run("evict", selector).returncode == 0, "it is evicted")  # noqa: B023
    until(lambda: daemon.ask("status")["connections"] == 1, "only the asking client is connected")


def open_files(daemon: Daemon) -> list[str]:
    """But for segments, which are kept for loads to come, and for connections that are about to go."""
    links = Path(f"/proc/{daemon.pid}/fd")
    opened = []
    for name in os.listdir(links):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError):
            opened.append(str((links / name).readlink()).split(":[")[0])
    return sorted(name for name in opened if "tensord-segment" not in name)


# ---- frames and the tables in them -----------------------------------------------------------------------


def frame(payload: bytes, fd_count: int = 0) -> bytes:
    return HEADER.pack(b"TSD1", len(payload), fd_count, 0) + payload


class Received(NamedTuple):
    payload: bytes
    fd_count: int


def receive(peer: socket.socket) -> Received | None:
    """A whole frame, its descriptors closed; None when the other side closes."""
    peer.settimeout(DEADLINE_SECONDS)
    content = b""
    wanted = HEADER.size
    count = 0
    while len(content) < wanted:
        try:
            more, fds, _, _ = socket.recv_fds(peer, wanted - len(content), 253)
        except ConnectionResetError:
            return None
        if not more:
            return None
        for fd in fds:
            os.close(fd)
        content += more
        count += len(fds)
        if len(content) == HEADER.size:
            wanted += HEADER.unpack(content)[1]
    return Received(content[HEADER.size :], count)


def table_at(payload: bytes, place: int) -> int:
    return place + int.from_bytes(payload[place : place + 4], "little")


def field_at(payload: bytes, table: int, slot: int) -> int:
    """Where the table's field lies, as the FlatBuffers format says it."""
    vtable = table - struct.unpack_from("<i", payload, table)[0]
    offset = struct.unpack_from("<H", payload, vtable + 4 + 2 * slot)[0]
    assert offset != 0, f"field {slot} is not there"
    return int(table + offset)


def with_version(hello: bytes, version: int) -> bytes:
    """Hello.protocol_version is its first field."""
    patched = bytearray(hello)
    struct.pack_into("<I", patched, field_at(hello, table_at(hello, 0), 0), version)
    return bytes(patched)


def reply_kind(payload: bytes) -> int:
    return payload[field_at(payload, table_at(payload, 0), 1)]


def failure(payload: bytes) -> tuple[int, str]:
    """Code and message of a ReplyFrame that holds a Failure."""
    assert reply_kind(payload) == FAILURE
    body = table_at(payload, field_at(payload, table_at(payload, 0), 2))
    text = table_at(payload, field_at(payload, body, 1))
    size = struct.unpack_from("<I", payload, text)[0]
    return payload[field_at(payload, body, 0)], payload[text + 4 : text + 4 + size].decode()


# ---- what real clients and daemons say -------------------------------------------------------------------


class Impostor:
    """Listens where clients look for a daemon."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.environment = {"TENSORD_RUNTIME_DIR": str(folder), "TENSORD_AUTOSTART": "0"}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen()
        self.listener.settimeout(DEADLINE_SECONDS)

    @contextlib.contextmanager
    def client(self, *words: str) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
        process = subprocess.Popen(
            [*COMMAND, *words],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            peer, _ = self.listener.accept()
            with peer:
                yield process, peer
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def impostor(short_folder: Path) -> Iterator[Impostor]:
    made = Impostor(Path(tempfile.mkdtemp(dir=short_folder)) / "run")
    yield made
    made.listener.close()


class Spoken(NamedTuple):
    """Frames of a real conversation, to be said again."""

    client_hello: bytes
    daemon_hello: bytes
    open_request: bytes  # of one file


@pytest.fixture(scope="module")
def spoken(daemon: Daemon, short_folder: Path) -> Spoken:
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes({"w": counted((5,))}))
    impostor = Impostor(folder / "run")
    try:
        with impostor.client("load", str(path)) as (_, peer):
            hello = receive(peer)
            assert hello is not None
            with connected(daemon) as real:
                real.sendall(frame(hello.payload))
                answer = receive(real)
            assert answer is not None
            peer.sendall(frame(answer.payload))
            request = receive(peer)
            assert request is not None and request.fd_count == 1
    finally:
        impostor.listener.close()
    return Spoken(hello.payload, answer.payload, request.payload)


@contextlib.contextmanager
def connected(daemon: Daemon) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(daemon.runtime_folder / "socket"))
        yield peer


@contextlib.contextmanager
def greeted(daemon: Daemon, spoken: Spoken) -> Iterator[socket.socket]:
    with connected(daemon) as peer:
        peer.sendall(frame(spoken.client_hello))
        assert receive(peer) is not None
        yield peer


# ---- bytes -----------------------------------------------------------------------------------------------

BAD_BYTES = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "NULs": bytes(64),
    "another magic": HEADER.pack(b"TSD2", 0, 0, 0),
    "a word that should be 0": HEADER.pack(b"TSD1", 4, 0, 1) + bytes(4),
    "a giant length": HEADER.pack(b"TSD1", 0xFFFFFFFF, 0, 0),
    "a length over the limit": HEADER.pack(b"TSD1", 64 * MIB + 1, 0, 0),
    "a giant number of descriptors": HEADER.pack(b"TSD1", 4, 0xFFFFFFFF, 0) + bytes(4),
    "descriptors that did not come": frame(bytes(64), fd_count=1),
    "an empty payload": frame(b""),
    "a root out of bounds": frame(b"\xff\xff\xff\x7f" + bytes(60)),
    "a table of NULs": frame(bytes(64)),
    "noise": frame(random.Random(1).randbytes(4096)),
}


@pytest.mark.parametrize("kind", BAD_BYTES)
@pytest.mark.parametrize("after_hello", [False, True])
def test_garbage_closes_the_connection(daemon: Daemon, spoken: Spoken, kind: str, after_hello: bool) -> None:
    with greeted(daemon, spoken) if after_hello else connected(daemon) as peer:
        with contextlib.suppress(BrokenPipeError):
            peer.sendall(BAD_BYTES[kind])
        assert receive(peer) is None


def test_mutated_requests_are_answered_or_close_the_connection(
    daemon: Daemon, spoken: Spoken, seed: int, make_file: Callable[..., Path]
) -> None:
    dice = random.Random(seed)
    file = os.open(make_file({"w": counted((5,))}), os.O_RDONLY)
    for _ in range(300):
        request = bytearray(spoken.open_request)
        for _ in range(dice.randint(1, 4)):
            request[dice.randrange(len(request))] = dice.choice([0, 1, 4, 0x7F, 0xFF, dice.randrange(256)])
        with greeted(daemon, spoken) as peer:
            socket.send_fds(peer, [frame(bytes(request), 1)], [file])
            peer.shutdown(socket.SHUT_WR)
            answer = receive(peer)
            assert answer is None or reply_kind(answer.payload) in (OPENED, REPORT, FAILURE)
    os.close(file)


def test_an_announced_length_takes_no_memory(daemon: Daemon, spoken: Spoken) -> None:
    before = status_kib(daemon.pid, "VmRSS")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            peer = stack.enter_context(greeted(daemon, spoken))
            peer.sendall(HEADER.pack(b"TSD1", 64 * MIB, 0, 0) + bytes(1000))
        assert daemon.ask("status")["connections"] == 21
        assert status_kib(daemon.pid, "VmRSS") - before < 16 << 10


def test_half_a_request_and_a_hangup_are_forgotten(daemon: Daemon, spoken: Spoken) -> None:
    whole = frame(spoken.open_request, 1)
    file = os.open("/dev/null", os.O_RDONLY)
    for size in (1, 8, HEADER.size, HEADER.size + 1, len(whole) // 2, len(whole) - 1):
        with greeted(daemon, spoken) as peer:
            socket.send_fds(peer, [whole[:size]], [file])
    os.close(file)


def test_slow_bytes_end_and_keep_nobody_waiting(daemon: Daemon, spoken: Spoken) -> None:
    whole = frame(spoken.open_request, 1)
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(connected(daemon))
        half = stack.enter_context(greeted(daemon, spoken))
        half.sendall(whole[: len(whole) // 2])
        dripping = stack.enter_context(greeted(daemon, spoken))
        idle = stack.enter_context(greeted(daemon, spoken))
        deadline = time.monotonic() + DEADLINE_SECONDS
        at = 0
        while not select.select([dripping], [], [], 0.2)[0]:  # one byte at a time, until it is closed
            assert time.monotonic() < deadline
            with contextlib.suppress(BrokenPipeError):
                dripping.sendall(whole[at : at + 1])
            at += 1
            assert daemon.ask("status")["pid"] == daemon.pid
        for peer in (silent, half, dripping):
            assert receive(peer) is None
        # Who owes nothing may be silent for as long as it likes.
        idle.setblocking(False)
        with pytest.raises(BlockingIOError):
            idle.recv(1)
    assert at < len(whole)


# ---- descriptors -----------------------------------------------------------------------------------------


def open_pipe(_: Path) -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def open_socket(_: Path) -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


def open_memfd(_: Path) -> int:
    fd = os.memfd_create("bad")
    os.write(fd, b"no checkpoint at all")
    return fd


def open_fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)


def open_for_writing(folder: Path) -> int:
    path = folder / "sound.safetensors"
    path.write_bytes(safetensors_bytes({"w": counted((5,))}))
    return os.open(path, os.O_WRONLY)


def open_path_only(folder: Path) -> int:
    os.close(open_for_writing(folder))
    return os.open(folder / "sound.safetensors", os.O_PATH)


BAD_DESCRIPTORS: dict[str, tuple[Callable[[Path], int], int, str]] = {
    "pipe": (open_pipe, INVALID_ARGUMENT, "is a FIFO"),
    "FIFO": (open_fifo, INVALID_ARGUMENT, "is a FIFO"),
    "socket": (open_socket, INVALID_ARGUMENT, "is a socket|not open for reading"),
    "folder": (lambda folder: os.open(folder, os.O_RDONLY), INVALID_ARGUMENT, "is a directory"),
    "device": (lambda _: os.open("/dev/zero", os.O_RDONLY), INVALID_ARGUMENT, "is a device"),
    "for writing": (open_for_writing, INVALID_ARGUMENT, "not open for reading"),
    "O_PATH": (open_path_only, INVALID_ARGUMENT, "not open for reading"),
    "memfd": (open_memfd, CHANGED, "deleted or replaced"),  # it has no name
    "epoll": (lambda _: select.epoll().fileno(), INVALID_ARGUMENT, "regular file"),
}


@pytest.mark.parametrize("kind", BAD_DESCRIPTORS)
def test_a_descriptor_that_is_no_readable_file_is_refused(
    daemon: Daemon, spoken: Spoken, tmp_path: Path, kind: str
) -> None:
    make, code, message = BAD_DESCRIPTORS[kind]
    epoll = select.epoll()
    fd = os.dup(epoll.fileno()) if kind == "epoll" else make(tmp_path)
    with greeted(daemon, spoken) as peer:
        socket.send_fds(peer, [frame(spoken.open_request, 1)], [fd])
        answer = receive(peer)
        assert answer is not None and answer.fd_count == 0
        said_code, said = failure(answer.payload)
        assert said_code == code
        assert "model.safetensors" in said and re.search(message, said), said
        # It is the request that was refused, not the client.
        fine = tmp_path / "fine.safetensors"
        fine.write_bytes(safetensors_bytes({"w": counted((5,))}))
        with fine.open("rb") as file:
            socket.send_fds(peer, [frame(spoken.open_request, 1)], [file.fileno()])
            answer = receive(peer)
        assert answer is not None and reply_kind(answer.payload) == OPENED and answer.fd_count == 4
    os.close(fd)
    epoll.close()


@pytest.mark.parametrize("count", [0, 2, 253])
def test_a_wrong_number_of_descriptors_is_refused(daemon: Daemon, spoken: Spoken, count: int) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    with greeted(daemon, spoken) as peer:
        if fds:
            socket.send_fds(peer, [frame(spoken.open_request, count)], fds)
        else:
            peer.sendall(frame(spoken.open_request))
        answer = receive(peer)
        assert answer is not None
        code, said = failure(answer.payload)
        assert code == INVALID_ARGUMENT and f"1 paths came with {count} descriptors" in said
    for fd in fds:
        os.close(fd)


def test_descriptors_that_no_frame_announces_close_the_connection(daemon: Daemon, spoken: Spoken) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    with greeted(daemon, spoken) as peer:
        with contextlib.suppress(BrokenPipeError):
            for at in range(HEADER.size):
                socket.send_fds(peer, [frame(spoken.open_request, 1)[at : at + 1]], fds)
        assert receive(peer) is None
    for fd in fds:
        os.close(fd)


# ---- versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 4, 0xFFFFFFFF])
def test_a_client_of_another_version_is_told_so(daemon: Daemon, spoken: Spoken, version: int) -> None:
    with connected(daemon) as peer:
        peer.sendall(frame(with_version(spoken.client_hello, version)))
        hello = receive(peer)
        refusal = receive(peer)
        assert hello is not None and refusal is not None
        code, said = failure(refusal.payload)
        assert code == UNSUPPORTED
        assert f"this client {version} " in said and "the daemon speaks protocol 3 " in said
        assert receive(peer) is None


@pytest.mark.parametrize(("version", "advice"), [(0, "restart the daemon"), (4, "update the client")])
def test_a_daemon_of_another_version_is_refused(
    spoken: Spoken, impostor: Impostor, version: int, advice: str
) -> None:
    with impostor.client("status") as (process, peer):
        assert receive(peer) is not None
        peer.sendall(frame(with_version(spoken.daemon_hello, version)))
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode != 0
    assert f"protocol {version} " in said and advice in said


def test_a_daemon_that_babbles_is_refused(impostor: Impostor) -> None:
    with impostor.client("status") as (process, peer):
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode != 0
    assert "not a frame of tensord's protocol" in said


# ---- users -----------------------------------------------------------------------------------------------


@pytest.fixture
def opened_up(daemon: Daemon, short_folder: Path) -> Iterator[None]:
    """The folders and the socket are open to everybody, so that only the daemon itself can refuse."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    runtime = daemon.runtime_folder
    places = (short_folder, runtime.parent, runtime, runtime / "socket")
    modes = {path: path.stat().st_mode for path in places}
    for path in modes:
        path.chmod(0o666 if path.name == "socket" else 0o755)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


# The command line of another user, who need not be able to read this interpreter and this package.
AS_ANOTHER_USER = f"""
import os, sys
from tensord import _library, cli
_library.library()
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(cli.run(sys.argv[1:]))
"""


def test_another_user_is_refused(daemon: Daemon, spoken: Spoken, opened_up: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, "status"],
        env={**os.environ, **daemon.environment},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode != 0 and done.stdout == ""
    assert "serves uid 0 alone" in done.stderr and f"you are uid {NOBODY}" in done.stderr


def test_another_user_is_told_so_and_heard_no_further(
    daemon: Daemon, spoken: Spoken, opened_up: None
) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            signal.alarm(DEADLINE_SECONDS)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with connected(daemon) as peer:
                hello, refusal = receive(peer), receive(peer)
                assert hello is not None and refusal is not None
                code, said = failure(refusal.payload)
                assert code == DENIED and f"you are uid {NOBODY}" in said
                assert receive(peer) is None
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert f"refused a client: this daemon serves uid 0 alone, you are uid {NOBODY}" in daemon.log()
