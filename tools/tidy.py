#!/usr/bin/env python3
"""The taste of the project as a program: `tools/tidy.py [ROOT]`.

Prints a line ``file:line: rule: message`` for each thing found and exits 1, or a line of totals and exits 0.
The include table is read from docs/ARCHITECTURE.md, so the document cannot drift from the code. The C++ rules
read the code as clang-format leaves it and know nothing of macros. Each rule has its case in tidy_test.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FILE_LINES_MAX = 800
FUNCTION_LINES_MAX = 70
CPP_LINES_MAX = 16_000  # all C++ of the product, without tests

WORDS = frozenset(
    (
        *("manager", "service", "controller", "coordinator", "orchestrator", "facade", "helper"),
        *("util", "common", "context", "runtime", "impl", "base"),
    )
)
# Libraries that are slow to parse or leak into callers: named in .cc files only.
LIBRARIES_NOT_IN_HEADERS = re.compile(r"#\s*include\s*<(nlohmann|fmt|spdlog|toml(\+\+)?)[/.]")

# What a reader elsewhere can do nothing with: paths of one machine, how the work was done, registries' hosts.
TEXTS = (
    (re.compile(r"/(?:work|root)/"), "a path that exists on one machine"),
    (re.compile(r"(?<!scope=\")\b[s]essions?\b(?! of its own)", re.I), "a word about how the work was done"),
    (re.compile(r"\b(?:pypi|pythonhosted|npmjs|debian|golang)\.org\b"), "the host of a package registry"),
)

CPP_SUFFIXES = (".h", ".cc", ".c")
TEXT_SUFFIXES = (
    *CPP_SUFFIXES,
    ".py",
    ".md",
    ".txt",
    ".toml",
    ".json",
    ".fbs",
    ".sh",
    ".yml",
    ".cmake",
    ".plan",
    "",
)
SKIPPED_FOLDERS = frozenset(("build", "dist", "corpus", "testdata", "__pycache__", "node_modules"))


@dataclass(frozen=True, order=True)
class Finding:
    """One breach of one rule at one line (from 1) of a file named from the root."""

    file: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message}"


@dataclass
class Source:
    """A file: its name from the root, its text, and for C++ its `code` without comments and literals."""

    name: str
    text: str
    code: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.name.endswith(CPP_SUFFIXES):
            self.code = blank_cpp(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        return Path(self.name).parts

    @property
    def is_test(self) -> bool:
        return (
            self.parts[0] == "tests" or re.search(r"_(test|testing|fuzz|bench)\.\w+$", self.name) is not None
        )

    @property
    def src_folder(self) -> str | None:
        """The folder of src/ that holds this file, `main` for src/ itself, None elsewhere."""
        if self.parts[0] != "src":
            return None
        return self.parts[1] if len(self.parts) > 2 else "main"

    def line_at(self, offset: int) -> int:
        return self.text.count("\n", 0, offset) + 1

    def finding(self, offset: int, rule: str, message: str) -> Finding:
        return Finding(self.name, self.line_at(offset), rule, message)


# ---- reading -----------------------------------------------------------------------------------------------

CPP_NOT_CODE = re.compile(
    r"""//[^\n]*                                    # comment to the end of the line
      | /\*.*?\*/                                   # comment
      | R"(?P<tag>[^()\s]*)\(.*?\)(?P=tag)"         # raw string
      | "(?:\\.|[^"\\\n])*"                         # string
      | (?<![0-9A-Fa-f])'(?:\\.|[^'\\\n])+'         # character; 1'000'000 is none
    """,
    re.VERBOSE | re.DOTALL,
)


def spaces(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def blank_cpp(text: str) -> str:
    """The text with comments and the insides of literals as spaces: every other character keeps its place."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        if found[0] == "/":
            return spaces(match)
        return found[0] + re.sub(r"[^\n]", " ", found[1:-1]) + found[-1]

    return CPP_NOT_CODE.sub(blank, text)


def read_tree(root: Path) -> list[Source]:
    """Every text file below root that could be committed, in order of name."""
    sources = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        folders = name.parts[:-1]
        hidden = any(part.startswith(".") and part != ".ci" for part in folders)
        if hidden or SKIPPED_FOLDERS & set(folders) or any(part.endswith(".egg-info") for part in folders):
            continue
        if path.is_symlink() or not path.is_file() or path.suffix not in TEXT_SUFFIXES:
            continue
        try:
            sources.append(Source(name.as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return sources


def read_include_table(architecture: str) -> dict[str, frozenset[str]]:
    """The table `| folder | may include |`: the folders that each folder may include, itself among them."""
    lines = iter(architecture.splitlines())
    for line in lines:
        if re.match(r"\|\s*folder\s*\|\s*may include\s*\|", line):
            break
    rows: list[tuple[list[str], str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not set(cells[0]) <= set("-: "):
            rows.append((split_names(cells[0]), cells[1]))

    folders = {name for names, _ in rows for name in names} - {"main"}
    table = {}
    for names, cell in rows:
        if cell.startswith("all but "):
            allowed = folders - set(split_names(cell.removeprefix("all but ")))
        else:
            allowed = set(split_names(cell))
        for name in names:
            table[name] = frozenset(allowed | {name})
    return table


def split_names(cell: str) -> list[str]:
    return [name for name in re.split(r",\s*|\s+and\s+", cell) if name not in ("", "–", "-")]


# ---- rules: includes ---------------------------------------------------------------------------------------

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


def quoted_includes(source: Source) -> Iterator[tuple[int, str]]:
    for match in INCLUDE.finditer(source.text):
        yield match.start(1), match.group(1)


def check_includes(sources: list[Source], table: dict[str, frozenset[str]]) -> Iterator[Finding]:
    """src/ follows the table; include/ is for others to take away, so it names nothing of src/."""
    if not table:
        yield Finding("docs/ARCHITECTURE.md", 1, "include", "no table `| folder | may include |`")
        return
    for source in sources:
        folder = source.src_folder
        for offset, target in quoted_includes(source):
            target_folder, _, rest = target.partition("/")
            if source.parts[0] == "include" and target_folder != "tensord":
                yield source.finding(offset, "include", f'public headers may not include "{target}"')
            if folder is None or target_folder in ("tensord", "protocol"):
                continue
            if not rest:
                yield source.finding(offset, "include", f'write "{target}" as "folder/{target}"')
            elif target_folder not in table.get(folder, ()):
                yield source.finding(
                    offset, "include", f'{folder} may not include "{target}" (ARCHITECTURE.md)'
                )


def check_cycles(sources: list[Source]) -> Iterator[Finding]:
    """Headers that include each other, each cycle told once, at the file where it closes."""
    arrows = {
        source.name.removeprefix("src/"): [target for _, target in quoted_includes(source)]
        for source in sources
        if source.parts[0] == "src"
    }
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> Iterator[Finding]:
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            yield Finding(f"src/{path[-1]}", 1, "cycle", cycle)
        if name in path or name in done:
            return
        path.append(name)
        for target in arrows.get(name, ()):
            yield from visit(target)
        path.pop()
        done.add(name)

    for name in arrows:
        yield from visit(name)


def check_header_libraries(source: Source) -> Iterator[Finding]:
    if source.name.endswith(".h") and source.parts[0] in ("src", "include"):
        for match in LIBRARIES_NOT_IN_HEADERS.finditer(source.text):
            yield source.finding(match.start(), "header-include", f"{match.group(1)} belongs in a .cc file")


# ---- rules: size -------------------------------------------------------------------------------------------


def check_file_lines(source: Source) -> Iterator[Finding]:
    count = source.text.count("\n")
    if count > FILE_LINES_MAX and source.name.endswith((*CPP_SUFFIXES, ".py")):
        yield Finding(source.name, count, "file-length", f"{count} lines, {FILE_LINES_MAX} allowed")


def check_function_lines(source: Source) -> Iterator[Finding]:
    functions = python_functions(source) if source.name.endswith(".py") else cpp_functions(source)
    for name, first, last in functions:
        count = last - first + 1
        if count > FUNCTION_LINES_MAX:
            yield Finding(
                source.name, first, "function-length", f"{name}: {count} lines, {FUNCTION_LINES_MAX} allowed"
            )


def python_functions(source: Source) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(source.text, source.name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, node.end_lineno or node.lineno


# What stands before the `{` of a function: its parameters, then perhaps qualifiers, a trailing type or the
# members of a constructor.
FUNCTION_HEAD = re.compile(
    r"\)\s*(const\b|noexcept\b|override\b|final\b|mutable\b|&|[A-Z_]+\([^()]*\)|\s)*(->.*|:[^:].*)?$",
    re.DOTALL,
)
# `Name(...) : member_{`: the brace of a constructor's member; the body is still to come.
MEMBER_HEAD = re.compile(r"\)\s*(noexcept\s*)?:[^:].*[\w>]$", re.DOTALL)
SCOPE_HEAD = re.compile(
    r"""^(inline\s+)?namespace\b | ^extern\s+"[^"]*"$
      | ^(template\b.*>\s*)?(typedef\s+)?(class|struct|union|enum)\b(?!.*\)$)""",
    re.VERBOSE | re.DOTALL,
)
PREPROCESSOR = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)


def cpp_functions(source: Source) -> Iterator[tuple[str, int, int]]:
    """Functions outside of functions, by their braces: name, first line of the head, line of the brace."""
    code = PREPROCESSOR.sub(spaces, source.code)
    kinds: list[
        str
    ] = []  # of the open braces: scope, function, or value (initializers, and all inside a function)
    head_start = function_start = 0
    for match in re.finditer(r"[{};]|\b(?:public|protected|private)\s*:(?!:)", code):
        outside = not {"function", "value"} & set(kinds)
        if match.group() == "{":
            head = code[head_start : match.start()]
            kinds.append(kind_of(head.strip()) if outside else "value")
            if kinds[-1] == "function":
                function_start = head_start + len(head) - len(head.lstrip())
            elif kinds[-1] == "scope":
                head_start = match.end()
        elif match.group() == "}":
            kind = kinds.pop() if kinds else "scope"
            if kind == "function":
                name = function_name(code[function_start : match.start()])
                yield name, source.line_at(function_start), source.line_at(match.start())
            if kind != "value":
                head_start = match.end()
        elif outside:
            head_start = match.end()


def kind_of(head: str) -> str:
    """What the brace after this head opens: scope, function or value (an initializer)."""
    if SCOPE_HEAD.search(head):
        return "scope"
    inside_parentheses = head.count("(") > head.count(")")
    if inside_parentheses or MEMBER_HEAD.search(head) or not FUNCTION_HEAD.search(head):
        return "value"
    return "function"


def function_name(code: str) -> str:
    code = re.sub(r"\brequires\b[^\n]*\n", "", code)
    match = re.search(r"([\w:~]+|operator\S+)\s*\(([^\n)]*)", code)
    if match is None:
        return "function"
    name, arguments = match.groups()
    return f"{name}({arguments})" if name.startswith("TEST") else name


def check_total(sources: list[Source]) -> Iterator[Finding]:
    total = cpp_lines(sources)
    if total > CPP_LINES_MAX:
        yield Finding("src", 1, "size", f"{total} lines of C++ without tests, {CPP_LINES_MAX} allowed")


def cpp_lines(sources: list[Source]) -> int:
    return sum(
        source.text.count("\n")
        for source in sources
        if source.code and source.parts[0] in ("src", "include") and not source.is_test
    )


# ---- rules: words and constructs ---------------------------------------------------------------------------

CPP_TYPE = re.compile(
    r"\b(?:class|struct|union|enum(?:\s+class)?|concept)\s+(?:\[\[[^\]]*\]\]\s*)?(?:[A-Z_]+\([^()]*\)\s*)?([A-Za-z_]\w*)"
    r"|\busing\s+([A-Za-z_]\w*)\s*="
)


def forbidden_word(name: str) -> str | None:
    """The first part of a CamelCase or snake_case name that is a word not used, plural or not."""
    for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name):
        word = part.lower()
        for form in (word, word.removesuffix("s"), word.removesuffix("es")):
            if form in WORDS:
                return str(part)
    return None


def check_words(source: Source) -> Iterator[Finding]:
    """Names of files and of types. src/base, the bottom of the tree, is the one place with such a name."""
    if not source.name.endswith((*CPP_SUFFIXES, ".py")):
        return
    for part in source.parts:
        word = forbidden_word(part.partition(".")[0])
        if word and not source.name.startswith("src/base/"):
            yield Finding(source.name, 1, "word", f"{word} in the name of a file")
    for name, offset in python_types(source) if source.name.endswith(".py") else cpp_types(source):
        if word := forbidden_word(name):
            yield source.finding(offset, "word", f"{word} in the name of type {name}")


def cpp_types(source: Source) -> Iterator[tuple[str, int]]:
    for match in CPP_TYPE.finditer(source.code):
        yield match.group(1) or match.group(2), match.start()


def python_types(source: Source) -> Iterator[tuple[str, int]]:
    for match in re.finditer(r"^[ \t]*class[ \t]+(\w+)", source.text, re.MULTILINE):
        yield match.group(1), match.start(1)


def check_ownership(source: Source) -> Iterator[Finding]:
    """No `new` but placement or straight into a smart pointer, no `delete` but a deleted function."""
    for match in re.finditer(r"(?<!operator )\bnew\b(?!\s*\((?!\s*std::nothrow))", source.code):
        owned = re.search(r"\b(unique|shared)_ptr<[\w:]+>\s*\w*\($", source.code[: match.start()])
        if not owned and not is_preprocessor(source, match.start()):
            yield source.finding(match.start(), "raw-new", "owners are values or std::unique_ptr")
    for match in re.finditer(r"(?<!operator )\bdelete\b", source.code):
        if not source.code[: match.start()].rstrip().endswith("="):
            yield source.finding(match.start(), "raw-new", "owners are values or std::unique_ptr")


def is_preprocessor(source: Source, offset: int) -> bool:
    return source.code[source.code.rfind("\n", 0, offset) + 1 : offset].lstrip().startswith("#")


def check_throw(source: Source) -> Iterator[Finding]:
    if source.parts[0] == "src":
        for match in re.finditer(r"\bthrow\b", source.code):
            yield source.finding(match.start(), "throw", "return a Result")


def check_texts(source: Source) -> Iterator[Finding]:
    for pattern, reason in TEXTS:
        for match in pattern.finditer(source.text):
            yield source.finding(match.start(), "text", f"'{match.group()}': {reason}")


# ---- all of them -------------------------------------------------------------------------------------------


def check_tree(root: Path) -> tuple[list[Finding], str]:
    """Every finding below root in order, and a line of totals."""
    sources = read_tree(root)
    architecture = root / "docs" / "ARCHITECTURE.md"
    table = read_include_table(architecture.read_text(encoding="utf-8")) if architecture.is_file() else {}

    findings = [*check_includes(sources, table), *check_cycles(sources), *check_total(sources)]
    for source in sources:
        findings += check_words(source)
        findings += check_texts(source)
        if source.name.endswith((*CPP_SUFFIXES, ".py")):
            findings += check_file_lines(source)
            findings += check_function_lines(source)
        if source.code:
            findings += check_header_libraries(source)
            findings += check_ownership(source)
            findings += check_throw(source)
    return sorted(findings), f"{len(sources)} files, {cpp_lines(sources)} lines of C++ without tests: clean"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    findings, totals = check_tree(root)
    for finding in findings:
        print(finding)
    if not findings:
        print(totals)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
