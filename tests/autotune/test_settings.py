"""autotune.settings: what a caller may choose."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import AutotuneError, SettingsError
from autotune.settings import Mode, Settings


@pytest.mark.parametrize("mode", [mode.value for mode in Mode])
def test_mode_may_be_given_by_name(mode: str) -> None:
    """A mode's plain name becomes the Mode."""
    assert Settings(mode=mode).mode is Mode(mode)  # type: ignore[arg-type]


def test_wrong_mode_lists_the_right_ones() -> None:
    """The error for an unknown mode names every mode and what came."""
    with pytest.raises(SettingsError, match=r"mode: expected one of tune, read, assert, retune, off, got 'fast'"):
        Settings(mode="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget_seconds", 0.0),
        ("budget_seconds", -1),
        ("budget_seconds", math.nan),
        ("budget_seconds", "60"),
        ("budget_seconds", True),
        ("wait_seconds", -0.1),
        ("wait_seconds", math.nan),
        ("log", "loud"),
        ("space", ""),
        ("space", "mine"),
        ("space", "mine:"),
        ("space", "my-module:configs"),
        ("space", "mine:a:b"),
        ("space", 7),
    ],
)
def test_impossible_value_is_refused_by_name(name: str, value: Any) -> None:
    """A value that cannot be is refused with the setting's name and the value."""
    with pytest.raises(SettingsError, match=name) as caught:
        Settings(**{name: value})
    assert repr(value) in str(caught.value)


def test_errors_are_value_errors_of_one_family() -> None:
    """A SettingsError can be caught as ValueError and as autotune's base error."""
    assert issubclass(SettingsError, ValueError)
    assert issubclass(SettingsError, AutotuneError)


def test_settings_cannot_change_after_they_were_passed_down() -> None:
    """Settings are frozen."""
    with pytest.raises(FrozenInstanceError):
        Settings().mode = Mode.OFF  # type: ignore[misc]


def test_only_choices_that_change_the_config_identify_settings() -> None:
    """Budget, waiting and logging never cause a decision to be made again; the database and the mode do."""
    base = Settings()
    assert Settings(budget_seconds=1, wait_seconds=2, log="quiet").identity == base.identity
    assert Settings(cache_dir=Path("elsewhere")).identity != base.identity
    assert Settings(mode=Mode.READ).identity != base.identity
    assert Settings(implementations=("triton",)).identity != base.identity
    assert Settings(space="my.module:configs").identity != base.identity


def test_empty_implementations_allow_everything() -> None:
    """No restriction allows all implementations, a restriction only those named."""
    assert Settings().allows("cute")
    assert Settings(implementations=("triton",)).allows("triton")
    assert not Settings(implementations=("triton",)).allows("cute")
