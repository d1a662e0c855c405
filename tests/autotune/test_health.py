"""What a GPU's own tool says, read defensively: its words differ from driver to driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune import health
from cache_db.models import Scalar


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("41, 0x0000000000000000\n", {"temperature_c": 41, "slowed_by": ""}),
        ("83, 0x0000000000000024", {"temperature_c": 83, "slowed_by": "power cap, software thermal"}),
        ("35, 0x0000000000000001", {"temperature_c": 35, "slowed_by": ""}),
        ("41, [N/A]", {"temperature_c": 41}),
        ("[N/A], 0x0000000000000008", {"slowed_by": "hardware slowdown"}),
        ("No devices were found", {}),
        ("", {}),
    ],
)
def test_the_answer_is_read_as_far_as_it_is_understood(line: str, expected: dict[str, Scalar]) -> None:
    """Degrees and reasons are taken where they are numbers; whatever else stands there is left out."""
    assert health.parse(line) == expected


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a tool of that name first on the path."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_an_older_driver_is_asked_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that the tool does not know is asked for by its former name."""
    answering(tmp_path, monkeypatch, 'case "$*" in *event*) exit 2;; esac; echo "50, 0x0000000000000080"')
    assert health.read("GPU-1") == {"temperature_c": 50, "slowed_by": "power brake"}


def test_without_a_tool_a_gpu_or_an_answer_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tool, a slice of a GPU, none at all, a tool that fails: no figures, no exception."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert health.read("GPU-1") == {}
    answering(tmp_path, monkeypatch, "exit 9")
    assert [health.read(gpu) for gpu in ("GPU-1", "MIG-1", "")] == [{}, {}, {}]
