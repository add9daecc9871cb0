"""Each rule of tools/tidy.py catches what it is for in a small tree, and leaves good code alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tidy

TABLE = """# architecture
| folder | may include |
|---|---|
| base | – |
| tensor | base |
| memory, storage | base, tensor |
| daemon | all but client and doctor |
| client | base, tensor, memory |
| doctor | memory |
| main | daemon, doctor |
"""

GOOD = {
    "docs/ARCHITECTURE.md": TABLE,
    "src/base/base_test.cc": '#include "base/fd.h"\n// A Manager in a comment, "throw".\n',
    "src/base/fd.h": "#pragma once\nclass Fd {\n  Fd(const Fd&) = delete;\n  int runtime_folder;\n};\n",
    "src/tensor/index.h": '#pragma once\n#include "base/fd.h"\n#include "tensor/dtype.h"\n',
    "src/tensor/dtype.h": '#pragma once\nconst char* kText = "throw new delete";\n',
    "src/tensor/json.cc": '#include <nlohmann/json.hpp>\n\n#include "protocol/tensord_generated.h"\n',
    "src/daemon/serve.cc": '#include <new>\n#include "storage/source.h"\nauto* p = ::new (at) int(1);\n',
    "src/storage/source.h": "#pragma once\n",
    "src/storage/source.cc": "auto source = std::unique_ptr<Source>(new Source);\n",
    "src/main.cc": '// In a session of its own.\n#include "daemon/serve.h"\n#include "doctor/doctor.h"\n',
    "include/tensord/client.h": '#pragma once\n#include "tensord/tensord.h"\n',
    "python/tensord/client.py": "class DatabaseError(Exception):\n    pass\n",
    "tests/test_open.py": 'import pytest\n\n\n@pytest.fixture(scope="session")\ndef model():\n    return 1\n',
}


def lines(count: int) -> str:
    return "  step();\n" * count


def findings(root: Path, files: dict[str, str]) -> list[str]:
    """What tidy prints for the good tree with these files added or put in the place of others."""
    for name, text in {**GOOD, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [str(finding) for finding in tidy.check_tree(root)[0]]


def test_a_good_tree_has_no_findings(tmp_path: Path) -> None:
    assert findings(tmp_path, {}) == []


CAUGHT = {
    "an arrow that the table lacks": (
        {"src/tensor/plan.cc": '#include "memory/copy.h"\n'},
        'src/tensor/plan.cc:1: include: tensor may not include "memory/copy.h"',
    ),
    "an arrow into what 'all but' leaves out": (
        {"src/daemon/wire.cc": '\n#include "client/client.h"\n'},
        'src/daemon/wire.cc:2: include: daemon may not include "client/client.h"',
    ),
    "an arrow of a file in src itself": (
        {"src/main.cc": '#include "tensor/index.h"\n'},
        'src/main.cc:1: include: main may not include "tensor/index.h"',
    ),
    "a folder that the table does not know": (
        {"src/gossip/gossip.cc": '#include "base/fd.h"\n'},
        'src/gossip/gossip.cc:1: include: gossip may not include "base/fd.h"',
    ),
    "an include without its folder": (
        {"src/tensor/plan.cc": '#include "index.h"\n'},
        'src/tensor/plan.cc:1: include: write "index.h" as "folder/index.h"',
    ),
    "a public header over a private one": (
        {"include/tensord/client.h": '#include "base/fd.h"\n'},
        'include/tensord/client.h:1: include: public headers may not include "base/fd.h"',
    ),
    "a table that is gone": (
        {"docs/ARCHITECTURE.md": "# architecture\n"},
        "docs/ARCHITECTURE.md:1: include: no table `| folder | may include |`",
    ),
    "headers that include each other": (
        {
            "src/tensor/a.h": '#include "tensor/b.h"\n',
            "src/tensor/b.h": '#include "tensor/c.h"\n',
            "src/tensor/c.h": '#include "tensor/a.h"\n',
        },
        "src/tensor/c.h:1: cycle: tensor/a.h -> tensor/b.h -> tensor/c.h -> tensor/a.h",
    ),
    "a long file of C++": (
        {"src/tensor/plan.cc": "\n" * 801},
        "src/tensor/plan.cc:801: file-length: 801 lines, 800 allowed",
    ),
    "a long file of Python": (
        {"python/tensord/client.py": "\n" * 801},
        "python/tensord/client.py:801: file-length: 801 lines, 800 allowed",
    ),
    "a long function of C++": (
        {
            "src/tensor/plan.cc": "namespace tensord::tensor {\n\nvoid Plan::run(\n    int a) {\n"
            + lines(68)
            + "}\n\n}\n"
        },
        "src/tensor/plan.cc:3: function-length: Plan::run: 71 lines, 70 allowed",
    ),
    "a long method in a class": (
        {"src/tensor/plan.h": "class Plan {\n public:\n  int run() const {\n" + lines(69) + "  }\n};\n"},
        "src/tensor/plan.h:3: function-length: run: 71 lines, 70 allowed",
    ),
    "a long constructor behind its members": (
        {"src/tensor/plan.cc": "Plan::Plan(int a)\n    : a_{a}, b_(1) {\n" + lines(68) + "}\n"},
        "src/tensor/plan.cc:1: function-length: Plan::Plan: 71 lines, 70 allowed",
    ),
    "a long test": (
        {"src/tensor/plan_test.cc": "TEST(Plan, fills) {\n" + lines(69) + "}\n"},
        "src/tensor/plan_test.cc:1: function-length: TEST(Plan, fills): 71 lines, 70 allowed",
    ),
    "a long function of Python": (
        {"tools/make.py": "def make():\n" + "    step()\n" * 70},
        "tools/make.py:1: function-length: make: 71 lines, 70 allowed",
    ),
    "a word not used as a file": (
        {"src/memory/segment_utils.h": "#pragma once\n"},
        "src/memory/segment_utils.h:1: word: utils in the name of a file",
    ),
    "a word not used as a type": (
        {"src/memory/pool.h": '\nclass CAPABILITY("mutex") SegmentManager {};\n'},
        "src/memory/pool.h:2: word: Manager in the name of type SegmentManager",
    ),
    "a word not used as an alias": (
        {"src/memory/pool.h": "using CopyContext = int;\n"},
        "src/memory/pool.h:1: word: Context in the name of type CopyContext",
    ),
    "a word not used as a class of Python": (
        {"python/tensord/client.py": "class ClientHelper:\n    pass\n"},
        "python/tensord/client.py:1: word: Helper in the name of type ClientHelper",
    ),
    "new": (
        {"src/memory/pool.cc": "auto* pool = new Pool;\n"},
        "src/memory/pool.cc:1: raw-new: owners are values or std::unique_ptr",
    ),
    "new that only looks like placement": (
        {"src/memory/pool.cc": "auto* pool = new (std::nothrow) Pool;\n"},
        "src/memory/pool.cc:1: raw-new: owners are values or std::unique_ptr",
    ),
    "delete": (
        {"src/memory/pool.cc": "void drop(Pool* pool) {\n  delete pool;\n}\n"},
        "src/memory/pool.cc:2: raw-new: owners are values or std::unique_ptr",
    ),
    "throw": (
        {"src/memory/pool.cc": "void refuse() {\n  throw 1;\n}\n"},
        "src/memory/pool.cc:2: throw: return a Result",
    ),
    "JSON in a header": (
        {"src/doctor/machine.h": "#pragma once\n#include <nlohmann/json.hpp>\n"},
        "src/doctor/machine.h:2: header-include: nlohmann belongs in a .cc file",
    ),
    "TOML in a header": (
        {"src/daemon/config.h": "#include <toml++/toml.h>\n"},
        "src/daemon/config.h:1: header-include: toml++ belongs in a .cc file",
    ),
    "a path of one machine": (
        {"docs/HACKING.md": "\nsee /wor" + "k/main\n"},
        "docs/HACKING.md:2: text: '/wor" + "k/': a path that exists on one machine",
    ),
    "how the work was done": (
        {"src/memory/pool.cc": "// added in ses" + "sion 3\n"},
        "src/memory/pool.cc:1: text: 'ses" + "sion': a word about how the work was done",
    ),
    "the host of a registry": (
        {"check": "pip install -i https://py" + "pi.org/simple\n"},
        "check:1: text: 'py" + "pi.org': the host of a package registry",
    ),
}


@pytest.mark.parametrize("case", CAUGHT)
def test_tidy_catches(case: str, tmp_path: Path) -> None:
    files, expected = CAUGHT[case]
    found = findings(tmp_path, files)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_the_cpp_together_has_a_limit_that_tests_do_not_count_for(tmp_path: Path) -> None:
    many = {f"src/memory/part{i}.cc": "\n" * 790 for i in range(20)}
    for_tests = {
        f"src/memory/pool_{kind}": "\n" * 790 for kind in ("test.cc", "testing.h", "testing.cc", "fuzz.cc")
    }
    assert findings(tmp_path, {**many, **for_tests}) == []
    found = findings(tmp_path, {"src/memory/more.cc": "\n" * 200})
    assert len(found) == 1
    assert "size: 16" in found[0]


def test_functions_end_where_their_braces_end(tmp_path: Path) -> None:
    code = """
#define JOIN(a) \\
  {             \\
  }
extern "C" {
TENSORD_API int open_it(const Options& options = {}, char brace = '{') { return 1'000; }
}
struct Options {
  std::function<void(int)> done{};
  std::vector<int> sizes = {1, 2};
};
template <typename T>
  requires(sizeof(T) > 1)
auto convert(T value) -> Result<T> {
  auto inner = [&](int x) {
    if (x) { return R"(})"; }  // }
  };
}
constexpr Verb kVerbs[] = {
    {"load", [](int x) { return x; }},
};
extern "C" int close_it(int a) noexcept {
}
"""
    source = tidy.Source("src/memory/pool.cc", code)
    assert list(tidy.cpp_functions(source)) == [("open_it", 6, 6), ("convert", 12, 18), ("close_it", 22, 23)]


def test_the_program_prints_findings_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(tidy.__file__)), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    findings(tmp_path, {})
    clean = run()
    assert (clean.returncode, clean.stdout.endswith("clean\n")) == (0, True)

    findings(tmp_path, {"src/memory/pool.cc": "void refuse() {\n  throw 1;\n}\n"})
    dirty = run()
    assert (dirty.returncode, dirty.stdout) == (1, "src/memory/pool.cc:2: throw: return a Result\n")
