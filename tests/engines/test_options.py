"""What stands in --model-loader-extra-config. Needs no engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tensord import InvalidArgumentError
from tensord.engines.options import VARIABLE, Options


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_nothing_is_the_defaults() -> None:
    for given in (None, "", {}, "{}"):
        assert Options.read(given) == (Options(), {})
    assert Options().said() == {}


def test_keys_are_read_from_json_and_from_mappings() -> None:
    given = {"strict": False, "only": ["a.*"], "memory_wait": 2, "rename": {"^a": "b"}, "cache": "/plans"}
    for form in (given, json.dumps(given)):
        options, rest = Options.read(form)
        assert options.said() == given
        assert rest == {}


def test_keys_of_the_engine_go_on_to_it() -> None:
    options, rest = Options.read({"num_threads": 4, "fallback": True}, ("num_threads",))
    assert options.fallback
    assert rest == {"num_threads": 4}


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Options.read({"fall_back": True}, ("num_threads",))
    for part in ("'fall_back'", "did you mean 'fallback'", "memory_wait", "num_threads"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"strict": 1},
        {"fallback": "yes"},
        {"only": []},
        {"only": 3},
        {"only": [""]},
        {"rename": ["a"]},
        {"cache": ""},
        {"autostart": "no"},
        {"memory_wait": -1},
        {"memory_wait": float("nan")},
        {"memory_wait": True},
        "[]",
        "{",
        3,
    ],
)
def test_a_value_that_makes_no_sense_is_refused(given: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        Options.read(given)


def test_the_variable_stands_for_keys_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"fallback": true, "strict": false}')
    assert Options.read({"strict": True})[0].said() == {"fallback": True}
    monkeypatch.setenv(VARIABLE, '{"falback": true}')
    with pytest.raises(InvalidArgumentError):
        Options.read({})
