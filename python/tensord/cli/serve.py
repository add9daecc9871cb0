"""What `tensord serve` accepts, in words. The compiled program reads it: daemon/config.cc has the same names.

Pure.
"""

from __future__ import annotations

from typing import NamedTuple

_COLUMN = 25  # where meanings begin


class Setting(NamedTuple):
    """One setting: a flag, a name in the file, a variable of the environment."""

    name: str  # as in the file
    value: str  # what kind of value
    meaning: str  # with the default

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


SETTINGS = (
    Setting(
        "runtime_dir",
        "FOLDER",
        "where the socket lies (default: $XDG_RUNTIME_DIR/tensord, else /tmp/tensord-UID)",
    ),
    Setting(
        "state_dir",
        "FOLDER",
        "where the catalog lies (default: $XDG_STATE_HOME/tensord, else ~/.local/state/tensord)",
    ),
    Setting(
        "host_memory",
        "SIZE",
        "most memory for weights, such as 64GiB (default: half of the cgroup's or machine's, "
        "also as it changes)",
    ),
    Setting(
        "memory_wait_seconds",
        "COUNT",
        "how long an open waits for memory that others hold (default: 30)",
    ),
    Setting(
        "prefault",
        "SIZE",
        "memory to touch in the background at start, so that loads find it warm (default: 0)",
    ),
    Setting(
        "read_threads",
        "COUNT",
        "threads that read and check files (default: one per core, at most 16)",
    ),
    Setting(
        "disk_reads",
        "WAY",
        "best, io_uring, pread (both with O_DIRECT), or buffered: how what is not cached is read "
        "(default: best)",
    ),
    Setting("cache", "CHOICE", "keep or drop: what reads leave in the page cache (default: keep)"),
    Setting("huge_pages", "CHOICE", "auto or never: pages of 2 MiB for weights (default: auto)"),
    Setting("gpu", "CHOICE", "auto or off: whether GPU memory is written to (default: auto)"),
    Setting(
        "gpu_memory",
        "SIZE",
        "most memory of each GPU for weights that stay there (default: 0, as much as the GPU has; "
        "what nobody holds goes when it is full)",
    ),
    Setting(
        "gpu_idle_seconds",
        "COUNT",
        "after so long without a copy a GPU is given back, with 0.5 GiB of its memory (default: 60)",
    ),
    Setting(
        "log_level",
        "LEVEL",
        "trace, debug (also records every read and copy), info, warning, error, off (default: info)",
    ),
    Setting("log_file", "FILE", "where log lines go, rotated at 10 MiB (default: standard error)"),
    Setting("drain_seconds", "COUNT", "how long SIGTERM lets running loads finish (default: 10)"),
)

_CONFIG = (
    "--config",
    "FILE",
    "settings in TOML (default: $TENSORD_CONFIG, else ~/.config/tensord/tensord.toml)",
)
_DETACH = ("--detach", "", "go to the background once started")

FLAGS = (_CONFIG, _DETACH, *((one.flag, one.value, one.meaning) for one in SETTINGS))

_NAMES = (
    'Every flag is also a name in the file (host_memory = "64GiB") and in the environment '
    "(TENSORD_HOST_MEMORY=64GiB)."
)


def serve_help() -> str:
    lines = [
        "tensord serve: run the daemon of this user in the foreground",
        "",
        "usage: tensord serve [flags]",
        "",
        *(_line(f"  {flag} {value}".rstrip(), meaning) for flag, value, meaning in FLAGS),
        "",
        _NAMES,
        "SIGTERM and SIGINT end it: running loads may finish first; a second one ends it at once.",
        "",
        "example: tensord serve --host-memory 64GiB --prefault 32GiB",
        "exit status: 0 stopped, 1 could not start or run, 2 wrong flags or settings",
    ]
    return "\n".join((*lines, ""))


def _line(flag: str, meaning: str) -> str:
    return f"{flag} ".ljust(_COLUMN) + meaning
