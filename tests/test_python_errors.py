"""Every code has a class; callers catch it as tensord's, or as the built-in it also is."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import tensord
from tensord import errors

HEADER = Path(__file__).resolve().parents[1] / "include" / "tensord" / "tensord.h"


def test_each_code_of_the_header_has_a_class_with_its_name() -> None:
    codes = re.findall(r"^  TENSORD_([A-Z_]+) = (\d+)", HEADER.read_text().split("} tensord_code;")[0], re.M)
    assert len(codes) == 11
    for name, number in codes[1:]:
        error = errors.error_of(int(number), "what happened", target_dirty=True)
        assert isinstance(error, tensord.Error)
        assert error.code == name.lower()
        assert error.target_dirty
        assert str(error) == "what happened"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.MissingFileError, FileNotFoundError),
        (errors.UnknownTensorError, KeyError),
        (errors.InvalidArgumentError, ValueError),
        (errors.InvalidIndexError, IndexError),
        (errors.ExhaustedError, MemoryError),
        (errors.UnavailableError, ConnectionError),
        (errors.WaitTimeoutError, TimeoutError),
        (errors.DeniedError, PermissionError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.UnsupportedDtypeError, TypeError),
        (errors.InternalError, RuntimeError),
        (errors.CorruptError, errors.SafetensorError),
        (errors.InvalidOptionError, errors.SafetensorError),
        (errors.UnknownTensorError, errors.SafetensorError),
    ],
)
def test_an_error_is_also_the_built_in_that_callers_catch(
    kind: type[errors.Error], builtin: type[BaseException]
) -> None:
    with pytest.raises(builtin) as caught:
        raise kind("read a.safetensors: no")
    assert isinstance(caught.value, tensord.Error)
    assert str(caught.value) == "read a.safetensors: no"


def test_safetensors_error_is_that_package_s_own() -> None:
    safetensors = pytest.importorskip("safetensors")
    assert issubclass(tensord.CorruptError, safetensors.SafetensorError)


def test_a_missing_file_has_errno_and_name() -> None:
    error = errors.MissingFileError("open a: gone", filename="a")
    assert (error.errno, error.filename, error.strerror) == (2, "a", "No such file or directory")


@pytest.mark.parametrize("kind", [errors.MissingFileError, errors.WaitTimeoutError, errors.CorruptError])
def test_errors_travel_between_processes(kind: type[errors.Error]) -> None:
    error = kind("open a: gone", target_dirty=True, filename="a")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.target_dirty
    assert getattr(copy, "filename", None) == getattr(error, "filename", None)
