"""The command line: every verb but `serve`, which the compiled program is.

words.py reads what was typed, verbs.py has the table of verbs, the others make texts of the daemon's answers.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from ..errors import (
    CancelledError,
    ChangedError,
    CorruptError,
    Error,
    InvalidArgumentError,
    UnavailableError,
)
from . import daemon, words
from .completion import completions
from .output import (
    CORRUPT,
    DONE,
    FAILED,
    INTERRUPTED,
    NO_DAEMON,
    STDOUT,
    USAGE,
    UsageError,
    complain,
    error_document,
    os_error,
    write,
)
from .table import quoted
from .verbs import VERBS, find, help_text, version_text

__all__ = ["exit_status", "main", "run"]


def main() -> int:
    """The program `tensord`. Returns the exit status (output.py has them)."""
    # As programs do: Ctrl-C ends it, also inside the library, and so does a pipe that nobody reads.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return run(sys.argv[1:])


def run(typed: Sequence[str]) -> int:
    """Does what the words behind ``tensord`` say and returns the exit status."""
    is_json = "--json" in typed
    verb_name = next((word for word in typed if not word.startswith("-")), "")
    verb = find(verb_name)
    shown_name = "" if verb is None else verb.name
    try:
        return _run(typed, verb, is_json)
    except UsageError as error:
        accepted = f"tensord {shown_name} --help" if shown_name else "tensord --help"
        first_line = str(error).partition("\n")[0]
        refusal = InvalidArgumentError(f"{first_line}; `{accepted}` says what is accepted")
        return _report(shown_name, refusal, is_json, USAGE)
    except Error as error:
        return _report(shown_name, error, is_json, exit_status(error))


def _run(typed: Sequence[str], verb: words.Verb | None, is_json: bool) -> int:
    if not typed:
        complain(words.help_on_all(VERBS))
        return USAGE
    if typed[0] == "serve" and not {"-h", "--help"} & set(typed):
        daemon.become(*typed)
    if typed[0] == "--complete":
        return _print(completions(VERBS, typed[1:]))
    before = typed[: typed.index(verb.name)] if verb else typed
    if "--version" in before:
        return _print(version_text())
    if verb is None:
        return _without_verb(typed)
    if {"-h", "--help"} & set(before):
        return _print(help_text(verb))
    if before:
        raise words.not_expected(before)
    asked = words.read(verb, typed[1:])
    if asked.given is None:
        return _print(help_text(verb))
    output = verb.run(asked.given)
    status = _print(output.json + "\n" if is_json else output.text)
    return output.status if status == DONE else status


def _without_verb(typed: Sequence[str]) -> int:
    if {"-h", "--help"} & set(typed):
        return _print(words.help_on_all(VERBS))
    if not typed[0].startswith("-"):
        raise UsageError(f"there is no verb {quoted(typed[0])}")
    raise UsageError("A subcommand is required")


def _print(text: str) -> int:
    try:
        write(STDOUT, text)
    except OSError as error:
        raise os_error("write to standard output", error) from None
    return DONE


def _report(verb_name: str, error: Error, is_json: bool, status: int) -> int:
    if is_json:
        with suppress(OSError):  # standard error has it too
            write(STDOUT, error_document(error.code, error.message) + "\n")
    complain(f"tensord: {verb_name + ': ' if verb_name else ''}{error.message}\n")
    return status


def exit_status(error: Error) -> int:
    """Asks for the daemon where that decides."""
    if isinstance(error, UnavailableError):  # also: a replica that is held
        return FAILED if daemon.answers() else NO_DAEMON
    if isinstance(error, (CorruptError, ChangedError)):
        return CORRUPT
    return INTERRUPTED if isinstance(error, CancelledError) else FAILED
