"""What ``tensord doctor`` has daemons read: tensors of a scratch file, or of a file of the user's."""

from __future__ import annotations

import json
import os
import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ..errors import ExhaustedError, InvalidArgumentError
from .checkpoint import Checkpoint
from .output import os_error
from .packing import Tensor
from .scratch import removed_at_end
from .table import size_text

MIB = 1 << 20
PAGE_BYTES = 4096
TENSOR_BYTES = 4 * MIB  # of a scratch file
TENSOR_BYTES_MIN = MIB  # of the user's file; smaller ones tell of their number more than of the disk

# What a slow disk cannot write, or read, in this time is left out, so that loads end soon.
SAMPLE_SECONDS = 2.0


class Sample(NamedTuple):
    """Tensors of one file, of at least TENSOR_BYTES_MIN each. They are in the page cache when it is made."""

    path: str
    names: Sequence[str]
    size_bytes: int
    fd: int

    def drop(self) -> None:
        """Out of the page cache."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def sample_of(path: str, size_bytes: int, size_bytes_max: int) -> Iterator[Sample]:
    """About `size_bytes`, less where they would be more than `size_bytes_max`; of a file at least half.

    Parameters
    ----------
    path : str
        A folder, for a scratch file that is gone behind the block; or a file with tensors, whose index the
        daemon that runs is asked for.

    Raises
    ------
    InvalidArgumentError
        The file is too small.
    ExhaustedError
        The bytes are not to be even one tensor.
    Error
        The folder cannot be written to, or the file not be read.
    """
    if size_bytes_max < TENSOR_BYTES:
        raise ExhaustedError(
            f"{size_text(size_bytes_max)} for each part of the measuring are too little; "
            f"{size_text(TENSOR_BYTES)} are needed"
        )
    size_bytes = min(size_bytes, size_bytes_max)
    if os.path.isdir(path):  # noqa: PTH112
        with _scratch_sample(path, size_bytes) as sample:
            yield sample
    else:
        with _given_sample(path, size_bytes, min(2 * size_bytes, size_bytes_max)) as sample:
            yield sample


# ---- a scratch file ----------------------------------------------------------------------------------------


@contextmanager
def _scratch_sample(folder: str, size_bytes: int) -> Iterator[Sample]:
    # Hidden, and without the suffix: nobody takes it for a part of the checkpoint that lies there.
    path = os.path.join(folder, f".tensord-doctor-{uuid.uuid4().hex}")  # noqa: PTH118
    with removed_at_end(path), ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("xb"))
            names = _write(file, size_bytes // TENSOR_BYTES)
        except OSError as error:
            raise os_error(f"write a scratch file in {folder}", error) from None
        yield Sample(path, names, len(names) * TENSOR_BYTES, file.fileno())


def _write(file: IO[bytes], count: int) -> list[str]:
    """Tensors of bytes that no disk can squeeze; their names."""
    names = [f"tensor {number}" for number in range(count)]
    body_offset = -(-(8 + len(_header(names))) // PAGE_BYTES) * PAGE_BYTES
    random = np.random.default_rng()
    deadline = time.monotonic() + SAMPLE_SECONDS
    file.seek(body_offset)
    for written in range(1, count + 1):
        file.write(random.bytes(TENSOR_BYTES))
        _sync(file)
        if time.monotonic() > deadline:
            del names[written:]
            break
    file.seek(0)
    file.write(struct.pack("<Q", body_offset - 8) + _header(names).ljust(body_offset - 8))
    _sync(file)
    return names


def _sync(file: IO[bytes]) -> None:
    """Pages that are not written yet cannot be dropped."""
    file.flush()
    os.fdatasync(file.fileno())


def _header(names: Sequence[str]) -> bytes:
    entries = {}
    for number, name in enumerate(names):
        offsets = [number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES]
        entries[name] = {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": offsets}
    return json.dumps(entries).encode()


# ---- a file of the user's ----------------------------------------------------------------------------------


@contextmanager
def _given_sample(path: str, size_bytes: int, size_bytes_max: int) -> Iterator[Sample]:
    with Checkpoint(path, is_index_only=True) as checkpoint, ExitStack() as stack:
        name = checkpoint.info()["files"][0]
        tensors = [
            tensor
            for tensor in sorted(checkpoint.tensors(), key=lambda tensor: tensor.offset)
            if tensor.file == 0 and TENSOR_BYTES_MIN <= tensor.size_bytes <= size_bytes_max
        ]
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            chosen = _read(fd, tensors, size_bytes, size_bytes_max)
        except OSError as error:
            raise os_error(f"read {name}", error) from None
        if not chosen:
            raise InvalidArgumentError(
                f"{path} is too small: {size_text(size_bytes // 2)} are needed, in tensors of "
                f"{size_text(TENSOR_BYTES_MIN)} to {size_text(size_bytes_max)}"
            )
        names = [tensor.name for tensor in chosen]
        yield Sample(path, names, sum(tensor.size_bytes for tensor in chosen), fd)


def _read(fd: int, tensors: Sequence[Tensor], size_bytes: int, size_bytes_max: int) -> list[Tensor]:
    """Those that make up the size, or half of it, or that could be read in the time; else none."""
    chosen: list[Tensor] = []
    total = 0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # else nothing tells that the disk is slow
    deadline = time.monotonic() + SAMPLE_SECONDS
    for tensor in tensors:
        if total + tensor.size_bytes > size_bytes_max:
            continue
        for at in range(tensor.offset, tensor.offset + tensor.size_bytes, TENSOR_BYTES):
            os.pread(fd, TENSOR_BYTES, at)
        chosen.append(tensor)
        total += tensor.size_bytes
        if total >= size_bytes or time.monotonic() > deadline:
            return chosen
    return chosen if total >= size_bytes // 2 else []
