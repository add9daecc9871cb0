"""A linked tree is found as a package, by its entry points too."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from link_package import link

PROJECT = """
[project]
name = "some-thing"
version = "3"

[project.scripts]
something = "something:main"

[project.entry-points."group.of.plugins"]
one = "something.plugin:register"

[tool.link_package]
import = ["early"]
"""


def test_entry_points_and_paths_are_what_pip_would_write(tmp_path: Path) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site"
    tree.mkdir()
    site.mkdir()
    (tree / "pyproject.toml").write_text(PROJECT)
    info = link(tree, tree / "python", site)
    found = importlib.metadata.PathDistribution(info)
    assert (found.metadata["Name"], found.version) == ("some-thing", "3")
    points = {(one.group, one.name, one.value) for one in found.entry_points}
    assert points == {
        ("console_scripts", "something", "something:main"),
        ("group.of.plugins", "one", "something.plugin:register"),
    }
    assert (site / "some_thing.pth").read_text() == f"{tree / 'python'}\nimport early\n"


def test_a_tree_without_a_version_is_linked_too(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "bare"\ndynamic = ["version"]\n')
    info = link(tmp_path, tmp_path, tmp_path)
    assert info.name == "bare-0+tree.dist-info"
    assert (info / "entry_points.txt").read_text() == ""
