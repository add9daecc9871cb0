"""safetensors' own Python tests, run against tensord.

Its source archive is fetched with pip and kept in build/safetensors; none of it is part of this repository.
The tests run unchanged in a process of their own, in which all that reads files is replaced by tensord's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, Daemon

VERSION = "0.8.0"
CACHE = REPOSITORY / "build" / "safetensors"
PIP_SECONDS = 120
SUITE_SECONDS = 600

# Test files of frameworks that tensord does not offer, and of which none is installed.
OTHER_FRAMEWORKS = ("flax", "mlx", "paddle", "tf")

# pip asks a source archive for its metadata before it believes in its name. Its own backend would want a
# Rust compiler for that; this one answers the question alone.
BACKEND = f"""
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory, "safetensors-{VERSION}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: safetensors\\nVersion: {VERSION}\\n")
    return folder.name
"""

# Loaded before the tests are collected. TENSORD_USED is where it tells what ran through tensord.
PLUGIN = """
import os
import sys

import safetensors
import safetensors.numpy
import safetensors.torch
import tensord

used = 0
original = tensord.safe_open.__init__

def counting(self, *arguments, **options):
    global used
    used += 1
    original(self, *arguments, **options)

tensord.safe_open.__init__ = counting
for module in (safetensors, safetensors.numpy, safetensors.torch):
    module.safe_open = tensord.safe_open
safetensors._safe_open_handle = tensord._safe_open_handle
safetensors.numpy.load_file = tensord.numpy.load_file
safetensors.torch.load_file = tensord.torch.load_file
safetensors.torch.load_model = tensord.torch.load_model

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"opened by tensord: {used}")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of bindings/python of the source archive."""
    archive = CACHE / f"safetensors-{VERSION}.tar.gz"
    if not archive.exists():
        download(archive)
    with tarfile.open(archive) as opened:
        folder = tmp_path_factory.mktemp("safetensors")
        opened.extractall(folder, filter="data")
    return folder / f"safetensors-{VERSION}" / "bindings" / "python"


def download(archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    backend = CACHE / "backend"
    backend.mkdir(exist_ok=True)
    (backend / "maturin.py").write_text(BACKEND)
    fetched = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--no-binary", ":all:", "--dest", str(CACHE), f"safetensors=={VERSION}"),
        ],
        env={**os.environ, "PYTHONPATH": str(backend)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PIP_SECONDS,
    )
    shutil.rmtree(backend)
    if not archive.exists():
        pytest.skip(f"safetensors' source archive cannot be had: {fetched.stderr[-500:]}")


@pytest.mark.usefixtures("daemon")
def test_safetensors_own_tests_pass(suite: Path, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("torch", "safetensors", "fsspec"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"safetensors' tests need {package}, which is not installed")
    (suite / "tensord_plugin.py").write_text(PLUGIN)
    ignored = [f"--ignore=tests/test_{framework}_comparison.py" for framework in OTHER_FRAMEWORKS]
    done = subprocess.run(
        [sys.executable, *["-m", "pytest", "-p", "tensord_plugin", "-rs", "tests"], *ignored],
        cwd=suite,
        env={**os.environ, "PYTHONPATH": f"{suite}{os.pathsep}{REPOSITORY / 'python'}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SUITE_SECONDS,
    )
    with capsys.disabled():
        print(f"\n{done.stdout[-3000:]}" if done.returncode else f"\n{done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    opened = [line for line in done.stdout.splitlines() if line.startswith("opened by tensord: ")]
    assert int(opened[0].split(": ")[1]) > 50, "the tests did not read through tensord"
