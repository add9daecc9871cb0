"""Makes a source tree a package of the environment this runs in: a .pth file, and its entry points.

python tools/link_package.py FOLDER_OF_PYPROJECT [FOLDER_OF_PACKAGES]

No copy that could be out of date, no build. The engines find their plug-ins by these entry points.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

import tomllib


def entry_points(project: dict[str, Any]) -> str:
    """The text of entry_points.txt."""
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    return "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items()) + "\n"
        for group, entries in groups.items()
        if entries
    )


def link(folder: Path, packages: Path, site: Path) -> Path:
    """Writes the .pth file and the .dist-info folder into `site`; returns the latter."""
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    project = settings["project"]
    imports = settings.get("tool", {}).get("link_package", {}).get("import", [])
    name = project["name"].replace("-", "_")
    version = project.get("version", "0+tree")
    lines = [str(packages.resolve()), *(f"import {module}" for module in imports)]
    (site / f"{name}.pth").write_text("\n".join(lines) + "\n")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points(project))
    return info


if __name__ == "__main__":
    root = Path(sys.argv[1])
    link(root, Path(sys.argv[2]) if len(sys.argv) > 2 else root, Path(sysconfig.get_path("purelib")))
