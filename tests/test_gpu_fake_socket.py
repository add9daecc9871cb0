"""Requests for copies into GPU memory that no client of ours would make: refused, and the daemon lives."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_gpu
import pytest
import tensord
from conftest import Daemon
from fake_gpu import MIB, POISON, Gpu, needs_no_driver
from test_socket import Impostor, connected, failure, frame, receive, reply_kind

pytestmark = needs_no_driver
library, gpu, start, path = fake_gpu.library, fake_gpu.gpu, fake_gpu.start, fake_gpu.path

INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE, UNSUPPORTED = 2, 1, 4, 9
COPY_TO_DEVICE, COPIED = 5, 4


class Message:
    """A FlatBuffers message, written from its root on; every field has 8 bytes."""

    def __init__(self) -> None:
        self.content = bytearray(4)

    def _align(self, remainder: int) -> int:
        """So that the next byte's place, modulo 8, is that."""
        self.content += bytes((remainder - len(self.content)) % 8)
        return len(self.content)

    def table(self, offset_at: int, values: list[int]) -> list[int]:
        """A table that the offset at a place leads to. Returns where its fields are, for offsets."""
        vtable = self._align(0)
        offsets = [4 + 8 * at for at in range(len(values))]
        self.content += struct.pack(f"<HH{len(values)}H", 4 + 2 * len(values), 4 + 8 * len(values), *offsets)
        place = self._align(4)
        struct.pack_into("<I", self.content, offset_at, place - offset_at)
        self.content += struct.pack(f"<i{len(values)}Q", place - vtable, *values)
        return [place + offset for offset in offsets]

    def vector(self, offset_at: int, count: int, content: bytes) -> None:
        struct.pack_into("<I", self.content, offset_at, self._align(4) - offset_at)
        self.content += struct.pack("<I", count) + content


UUID = b"fake0".ljust(16, b"\0")


class Copies:
    """A CopyToDevice, right in all its parts unless they are changed."""

    def __init__(self, replica: int, size_bytes: int, handle: bytes) -> None:
        self.replica = replica
        self.uuid = UUID
        self.targets = [(size_bytes, 0, handle)]  # and the number of allocations
        self.allocation_bytes: list[int] = []
        # source and target offset, row bytes and count, pitches, target
        self.rows = [(0, 0, 100, 1, 0, 0, 0)]

    def frame(self, fd_count: int = 0) -> bytes:
        message = Message()
        _, _, request = message.table(0, [77, COPY_TO_DEVICE, 0])
        _, uuid, targets, sizes, rows = message.table(request, [self.replica, 0, 0, 0, 0])
        message.vector(uuid, len(self.uuid), self.uuid)
        message.vector(
            targets, len(self.targets), b"".join(struct.pack("<QI64s4x", *one) for one in self.targets)
        )
        count = len(self.allocation_bytes)
        message.vector(sizes, count, struct.pack(f"<{count}Q", *self.allocation_bytes))
        message.vector(rows, len(self.rows), b"".join(struct.pack("<6QI4x", *one) for one in self.rows))
        return frame(bytes(message.content), fd_count)


class Hostile:
    """A daemon with one replica, memory of ours, and a connection that says anything."""

    def __init__(self, daemon: Daemon, replica: int, gpu: Gpu, hello: bytes) -> None:
        self.daemon = daemon
        self.memory = gpu.memory(4096)
        handle = ctypes.create_string_buffer(64)
        primary = ctypes.c_void_p()
        assert gpu.driver.cuDevicePrimaryCtxRetain(ctypes.byref(primary), 0) == 0
        assert gpu.driver.cuCtxSetCurrent(primary) == 0
        assert gpu.driver.cuIpcGetMemHandle(handle, ctypes.c_uint64(self.memory)) == 0
        assert gpu.driver.cuCtxSetCurrent(None) == 0
        gpu.driver.cuDevicePrimaryCtxRelease_v2(0)
        self._replica, self._handle, self._hello = replica, handle.raw, hello

    def copies(self) -> Copies:
        return Copies(self._replica, 4096, self._handle)

    def ask(self, copies: Copies, fds: list[int] | None = None) -> bytes:
        with connected(self.daemon) as peer:
            peer.sendall(frame(self._hello))
            assert receive(peer) is not None
            socket.send_fds(peer, [copies.frame(len(fds or []))], fds or [])
            answer = receive(peer)
        assert answer is not None
        return answer.payload

    def refusal(self, copies: Copies, fds: list[int] | None = None) -> tuple[int, str]:
        """And after it the daemon copies as ever."""
        refused = failure(self.ask(copies, fds))
        assert reply_kind(self.ask(self.copies())) == COPIED
        return refused


@pytest.fixture
def hostile(start: Callable[..., Daemon], gpu: Gpu, path: Path, short_folder: Path) -> Iterator[Hostile]:
    daemon = start()
    impostor = Impostor(Path(tempfile.mkdtemp(dir=short_folder)) / "run")
    with impostor.client("ls") as (_, peer):
        hello = receive(peer)
    impostor.listener.close()
    assert hello is not None
    with tensord.open(path, "np") as model:
        model.wait()
        yield Hostile(daemon, daemon.ask("ls")["replicas"][0]["replica"], gpu, hello.payload)


HUGE = (1 << 64) - 1
ROWS_OUT_OF_BOUNDS = {
    "a source behind the image": (1 << 40, 0, 100, 1, 0, 0, 0),
    "a source that wraps": (HUGE - 50, 0, 100, 1, 0, 0, 0),
    "a target behind its memory": (0, 4000, 100, 1, 0, 0, 0),
    "a target that wraps": (0, HUGE - 50, 100, 1, 0, 0, 0),
    "a row of nothing": (0, 0, 0, 1, 0, 0, 0),
    "a row without end": (0, 0, HUGE, 1, 0, 0, 0),
    "no rows": (0, 0, 100, 0, 100, 100, 0),
    "rows without end": (0, 0, 100, HUGE, 100, 100, 0),
    "rows that leave the target": (0, 0, 100, 42, 100, 100, 0),
    "rows upon each other": (0, 0, 100, 2, 100, 50, 0),
    "a pitch that wraps": (0, 0, 100, 2, HUGE, 100, 0),
    "another target": (0, 0, 100, 1, 0, 0, 1),
}


@pytest.mark.parametrize("kind", ROWS_OUT_OF_BOUNDS)
def test_copies_out_of_bounds_are_refused(hostile: Hostile, kind: str) -> None:
    copies = hostile.copies()
    copies.rows = [(0, 0, 16, 1, 0, 0, 0), ROWS_OUT_OF_BOUNDS[kind]]
    code, message = hostile.refusal(copies)
    assert code == INVALID_ARGUMENT and "copy 1 of 2 to a GPU" in message
    assert ctypes.string_at(hostile.memory + 100, 3996) == bytes([POISON]) * 3996


def test_devices_and_replicas_that_do_not_exist_are_refused(hostile: Hostile) -> None:
    for uuid, wanted in ((b"abc", INVALID_ARGUMENT), (b"", INVALID_ARGUMENT), (b"x" * 16, UNAVAILABLE)):
        copies = hostile.copies()
        copies.uuid = uuid
        assert hostile.refusal(copies)[0] == wanted
    copies = hostile.copies()
    copies.replica = 4711
    assert hostile.refusal(copies) == (NOT_FOUND, "there is no replica 4711; open the model again")


def test_handles_of_no_memory_are_refused(hostile: Hostile) -> None:
    handle = hostile.copies().targets[0][2]
    for wrong in (bytes(64), b"noise" * 12 + bytes(4), handle[:8] + struct.pack("<i", 1 << 22) + handle[12:]):
        copies = hostile.copies()
        copies.targets = [(4096, 0, wrong)]
        code, message = hostile.refusal(copies)
        assert code == UNSUPPORTED and "open a client's GPU memory" in message
    copies = hostile.copies()
    copies.targets = [(8192, 0, handle)]
    copies.rows = [(0, 8000, 100, 1, 0, 0, 0)]
    code, message = hostile.refusal(copies)
    assert code == INVALID_ARGUMENT and "its memory only" in message


def test_descriptors_that_are_not_as_announced_are_refused(hostile: Hostile, gpu: Gpu) -> None:
    memory = os.memfd_create("fake-cuda")
    os.truncate(memory, 4 * MIB)
    null = os.open("/dev/null", os.O_RDWR)
    half = 2 * MIB
    cases: list[tuple[list[int], int, list[int], str]] = [
        # sizes, allocations of the target, descriptors
        ([half], 1, [], "1 allocations on a GPU came with 0 descriptors"),
        ([], 1, [memory], "0 allocations on a GPU came with 1 descriptors"),
        ([half], 2, [memory], "more allocations than came with them"),
        ([half], (1 << 32) - 1, [memory], "more allocations than came with them"),
        ([half], 1, [null], "import GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([8 * MIB], 1, [memory], "map GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([5000], 1, [memory], "reserve addresses for GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([HUGE - half + 1, 2 * half], 2, [memory, memory], "map GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([100], 1, [memory], "larger than the memory that came with it"),
    ]
    for sizes, count, fds, words in cases:
        copies = hostile.copies()
        copies.targets = [(4096, count, bytes(64))]
        copies.allocation_bytes = sizes
        code, message = hostile.refusal(copies, fds)
        assert code in (INVALID_ARGUMENT, UNSUPPORTED) and words in message, (words, message)
    copies = hostile.copies()
    copies.targets = [(4 * MIB, 1, bytes(64))]
    copies.allocation_bytes = [4 * MIB]
    copies.rows = [(0, 3 * MIB, 100, 1, 0, 0, 0)]
    assert reply_kind(hostile.ask(copies, [memory])) == COPIED
    assert os.pread(memory, 100, 3 * MIB) == ctypes.string_at(hostile.memory, 100)
    os.close(memory)
    os.close(null)


def test_requests_cut_and_mutated_leave_the_daemon_alive(hostile: Hostile, seed: int) -> None:
    dice = random.Random(seed)
    right = hostile.copies().frame()
    header_bytes = 16
    for _ in range(300):
        request = bytearray(right)
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(header_bytes, len(request))
            request[place] = dice.choice([0, 1, 4, 0x7F, 0xFF, dice.randrange(256)])
        with connected(hostile.daemon) as peer:
            peer.sendall(frame(hostile._hello))
            assert receive(peer) is not None
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            receive(peer)
    assert reply_kind(hostile.ask(hostile.copies())) == COPIED
