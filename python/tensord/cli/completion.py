"""Completion of words in shells. Their scripts ask the program: ``tensord --complete WORD...``. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .words import HELP, VERSION, Verb, Word

_BASH = r"""_tensord() {
  mapfile -t COMPREPLY < <(tensord --complete "${COMP_WORDS[@]:1:COMP_CWORD}")
  if [[ ${COMPREPLY[0]} == '<files>' ]]; then
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")
  else
    COMPREPLY=("${COMPREPLY[@]%%$'\t'*}")
  fi
}
complete -F _tensord tensord
"""

_ZSH = r"""#compdef tensord
_tensord() {
  local -a lines=(${(f)"$(tensord --complete "${(@)words[2,CURRENT]}")"})
  if [[ $lines[1] == '<files>' ]]; then
    _files
  else
    lines=("${(@)lines//:/\\:}")
    lines=("${(@)lines/$'\t'/:}")
    _describe word lines
  fi
}
compdef _tensord tensord
"""

_FISH = r"""function __tensord_complete
  set -l words (commandline -opc) (commandline -ct)
  set -l lines (tensord --complete $words[2..-1])
  if test "$lines" = '<files>'
    __fish_complete_path (commandline -ct)
  else
    string join \n -- $lines
  end
end
complete -c tensord -f -a '(__tensord_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

FILES = "<files>"
_OF_FILES = frozenset(("PATH", "REPLICA", "LOAD", "FOLDER", "FILE", "MODEL"))

_Candidate = tuple[str, str]  # a word and its summary


def completions(verbs: Sequence[Verb], words: Sequence[str], serve_help: Callable[[], str]) -> str:
    """What may stand for the last of `words`, the words after ``tensord``.

    Returns
    -------
    str
        A line for each, its summary behind a tab; or one line ``<files>``: any file. The flags of `serve` are
        those in its help, which `serve_help` gives.
    """
    last = words[-1] if words else ""
    lines = []
    for candidate, summary in _candidates(verbs, words, last, serve_help):
        if candidate.startswith(last) or candidate == FILES:
            lines.append(f"{candidate}\t{summary}\n" if summary else f"{candidate}\n")
    return "".join(lines)


def _candidates(
    verbs: Sequence[Verb], words: Sequence[str], last: str, serve_help: Callable[[], str]
) -> Iterator[_Candidate]:
    name = next((word for word in words[:-1] if not word.startswith("-")), None)
    if name is None:
        yield from ((verb.name, verb.summary) for verb in verbs)
        yield from ((word.name, word.summary) for word in (HELP, VERSION))
        return
    verb = next((verb for verb in verbs if verb.name == name), None)
    if verb is None:
        return
    before = words[-2] if len(words) > 1 else ""
    asking = next((flag for flag in verb.flags if flag.name == before and flag.takes_value), None)
    if asking is not None:
        yield from _values(asking)
    elif last.startswith("-"):
        yield from _flags_in(serve_help()) if name == "serve" else _flags(verb)
    else:
        typed = sum(not word.startswith("-") for word in words[:-1]) - 1  # values of flags count too
        for operand in verb.operands[min(typed, max(len(verb.operands) - 1, 0)) :][:1]:
            yield from _values(operand)


def _flags(verb: Verb) -> Iterator[_Candidate]:
    return ((flag.name, flag.summary) for flag in (HELP, *verb.flags))


def _flags_in(text: str) -> Iterator[_Candidate]:
    """Of the lines ``  --flag VALUE   summary`` of a help."""
    for line in text.splitlines():
        if line.startswith("  -") and "--" in line:
            flag, _, rest = line[line.index("--") :].partition(" ")
            yield flag, f" {rest}".partition("  ")[2].strip()


def _values(word: Word) -> Iterator[_Candidate]:
    """What a flag or an operand takes: its choices, or files where its name says so."""
    yield from ((choice, "") for choice in word.choices)
    if (word.value or word.name) in _OF_FILES:
        yield FILES, ""
