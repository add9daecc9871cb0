"""The words of the command line: what a verb takes, how it is read, and the help on it. Pure.

Not argparse: its messages and its help differ between versions of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .output import Output, UsageError

COLUMN = 30  # where summaries begin

EXIT_HELP = """\
Exit status: 0 done; 1 it failed; 2 the command line makes no sense; 3 no daemon runs, or it does not
answer; 4 the bytes are corrupt or changed; 130 interrupted. Errors are on standard error.
"""


class Word(NamedTuple):
    """An operand (``PATH``) or a flag (``--only``) of a verb.

    `read` turns a text into a value; its ValueError says what is wrong. `kind` names a value that is missing.
    """

    name: str
    summary: str
    value: str = ""  # as the help names a flag's value; empty: the flag takes none
    choices: tuple[str, ...] = ()
    kind: str = "TEXT"
    read: Callable[[str], Any] = str
    is_required: bool = False  # an operand
    is_repeated: bool = False

    @property
    def is_flag(self) -> bool:
        return self.name.startswith("-")

    @property
    def takes_value(self) -> bool:
        return bool(self.value) or not self.is_flag

    def check(self, text: str) -> Any:
        """The value of a text. Raises UsageError."""
        if self.choices and text not in self.choices:
            raise UsageError(f"{self.name}: {text} not in {{{','.join(self.choices)}}}")
        try:
            return self.read(text)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from None

    def missing(self) -> UsageError:
        kind = f"{self.kind}:{{{','.join(self.choices)}}}" if self.choices else self.kind
        return UsageError(f"{self.name}: 1 required {kind} missing")


class Given:
    """What the words said: an attribute for each word of the verb."""

    def __init__(self, **values: Any) -> None:
        self.operand = ""
        self.json = False
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:  # for type checkers: fields are the words of the table
        raise AttributeError(name)


HELP = Word("--help", "print this")
VERSION = Word("--version", "print the version")
JSON = Word("--json", "print one JSON document instead of text")


class Verb(NamedTuple):
    name: str
    summary: str
    example: str
    run: Callable[[Given], Output]
    words: tuple[Word, ...] = ()  # but for --json, which all have

    @property
    def flags(self) -> list[Word]:
        return [*(word for word in self.words if word.is_flag), JSON]

    @property
    def operands(self) -> list[Word]:
        return [word for word in self.words if not word.is_flag]

    def field_of(self, word: Word) -> str:
        """Under which `Given` keeps a word: the first operand is `operand`, a second one has its own name."""
        return "operand" if word in self.operands[:1] else word.name.lstrip("-").lower()


class _Reading:
    """The words of one verb, sorted."""

    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}  # by the name of their word
        self.unexpected: list[str] = []
        self.wants_help = False


class Asked(NamedTuple):
    """What is to be done: run the verb, or print the help on it."""

    given: Given | None  # None: help


def read(verb: Verb, words: Sequence[str]) -> Asked:
    """Reads the words behind a verb. Raises UsageError."""
    reading = _sort(verb, words)
    if reading.wants_help:
        return Asked(None)
    given = Given()
    for word in (*verb.words, JSON):
        texts = reading.values.get(word.name, [])
        if len(texts) > 1 and word.takes_value and not word.is_repeated:
            raise UsageError(f"{word.name}: At Most 1 required but received {len(texts)}")
        values = [word.check(text) if word.takes_value else True for text in texts]
        field = verb.field_of(word)
        if word.is_repeated:
            setattr(given, field, values)
        elif values:
            setattr(given, field, values[0])
        elif word.is_flag:
            setattr(given, field, None if word.takes_value else False)
    for operand in verb.operands:
        if operand.is_required and operand.name not in reading.values:
            raise UsageError(f"{operand.name} is required")
    if reading.unexpected:
        raise not_expected(reading.unexpected)
    return Asked(given)


def not_expected(words: Sequence[str]) -> UsageError:
    what = "arguments were" if len(words) > 1 else "argument was"
    return UsageError(f"The following {what} not expected: {' '.join(words)}")


def _sort(verb: Verb, words: Sequence[str]) -> _Reading:
    flags = {flag.name: flag for flag in verb.flags}
    reading = _Reading()
    rest = iter(words)
    are_flags = True
    for word in rest:
        name, equals, value = word.partition("=")
        if are_flags and word == "--":
            are_flags = False
        elif are_flags and word in ("-h", "--help"):
            reading.wants_help = True
        elif are_flags and name in flags:
            flag = flags[name]
            if flag.takes_value and not value:
                value = next(rest, "") if not equals else ""
                if not value:
                    raise flag.missing()
            elif equals and not flag.takes_value:
                raise UsageError(f"Could not convert: {name} = {value}")
            reading.values.setdefault(name, []).append(value)
        else:
            operand = next((one for one in verb.operands if one.name not in reading.values), None)
            if operand is None or (are_flags and _looks_like_flag(word)):
                reading.unexpected.append(word)
            else:
                reading.values[operand.name] = [word]
    return reading


def _looks_like_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-")


# ---- help --------------------------------------------------------------------------------------------------


def help_on(verb: Verb) -> str:
    operands = verb.operands
    usage = f"Usage: tensord {verb.name} [OPTIONS]"
    lines = [verb.summary]
    if not operands:
        lines += [usage, ""]
    else:
        shown = " ".join(one.name if one.is_required else f"[{one.name}]" for one in operands)
        described = [_line(one.name, one.summary) for one in operands]
        lines += [f"{usage} {shown}", "", "Positionals:", *described, ""]
    lines += ["Options:", _line("-h,--help", HELP.summary)]
    lines += [_line(f"{flag.name} {flag.value}".rstrip(), flag.summary) for flag in verb.flags]
    return "\n".join((*lines, "", f"Example: {verb.example}", "", EXIT_HELP))


def help_on_all(verbs: Sequence[Verb]) -> str:
    lines = [
        "tensord: the shared tensor layer of a machine",
        "",
        "Usage: tensord [OPTIONS] VERB",
        "",
        "Options:",
        _line("-h,--help", HELP.summary),
        _line(VERSION.name, VERSION.summary),
        "",
        "Verbs:",
        *(_line(verb.name, verb.summary) for verb in verbs),
        "",
        "`tensord VERB --help` tells more, with an example. All but serve have --json.",
    ]
    return "\n".join((*lines, "", EXIT_HELP))


def _line(name: str, summary: str) -> str:
    return f"  {name}".ljust(COLUMN) + summary
