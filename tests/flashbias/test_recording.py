"""FLASHBIAS_RECORD: the shapes file of a run tunes exactly the problems that the run met."""

from __future__ import annotations

import itertools
import logging
import resource
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch

from autotune.device import describe, interpreting
from flashbias import CacheMiss, flash_bias_func, plans, recording
from flashbias.band import Band, band
from flashbias.cli import shapes
from flashbias.kernels.problem import Shape, problem
from flashbias.recording import record, table
from flashbias.settings import reread as reread_environment
from flashbias.settings import settings
from flashbias.varlen.band import sequence_band

DEVICE = describe(-1)
PLAIN = {"batch": 2, "nheads": 4, "headdim": 16}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets which files could not be written."""
    monkeypatch.setattr(recording, "_failed", set())


def reread(folder: Path, shape: Shape, seen: Band) -> Shape:
    """Returns the shape that prewarm reads from what is recorded."""
    path = folder / "shapes.toml"
    path.write_text(table(shape, seen), encoding="utf-8")
    (found,) = shapes.from_file(path)
    return found


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(100, 100), (40, 700), (700, 40), (1, 50), (50, 1)])
def test_recorded_shape_is_the_same_problem(tmp_path: Path, seqlen_q: int, seqlen_k: int) -> None:
    """Whatever its causal bound and window, dense or packed, a call comes back as the problem that it was."""
    causals: tuple[bool | Literal["bottom_right"], ...] = (False, True, "bottom_right")
    windows = ((-1, -1), (7, -1), (-1, 5), (7, 5), (0, 0))
    for causal, window, varlen in itertools.product(causals, windows, (False, True)):
        if varlen:
            seen, _ = sequence_band(causal, window, seqlen_q, seqlen_k)
        else:
            seen = band(causal, window, seqlen_q, seqlen_k).within(seqlen_q, seqlen_k)
        shape = Shape(**PLAIN, seqlen_q=seqlen_q, seqlen_k=seqlen_k, varlen=varlen)
        found = reread(tmp_path, shape, seen)
        assert problem(found, DEVICE) == problem(shape, DEVICE, seen), (causal, window, varlen)


def test_every_other_field_comes_back(tmp_path: Path) -> None:
    """Dtypes, rank, groups, gradients, mask and layout are those of the call."""
    shape = Shape(
        **PLAIN,
        seqlen_q=20,
        seqlen_k=30,
        nheads_kv=2,
        value_dim=32,
        rank=3,
        factor_dtype="float32",
        dtype="bfloat16",
        mask="float32",
        mask_dims="keys",
        grads=("q", "mask"),
        layout="strided",
    )
    assert reread(tmp_path, shape, Band(None, None)) == shape


@pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
def test_calls_are_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal calls are one table, another mask kind is another; that nothing is tuned for them yet changes nothing."""
    path = tmp_path / "deep" / "shapes.toml"
    monkeypatch.setenv("FLASHBIAS_RECORD", str(path))
    reread_environment()
    plans.forget()
    with settings(mode="assert", cache_dir=tmp_path):
        for mask in (None, None, torch.ones(20, 20, dtype=torch.bool)):
            q = torch.randn(1, 20, 2, 16).half()
            with pytest.raises(CacheMiss):
                flash_bias_func(q, q, q, mask=mask)
    plans.forget()
    monkeypatch.undo()
    reread_environment()
    assert [(each.seqlen_q, each.mask) for each in shapes.from_file(path)] == [(20, "none"), (20, "bool")]


def test_many_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    """Eight threads that note the same ten shapes at once leave ten tables."""
    path = tmp_path / "shapes.toml"

    def write() -> None:
        for rows in range(1, 11):
            record(path, Shape(**PLAIN, seqlen_q=rows, seqlen_k=9), Band(None, 0))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.seqlen_q for each in shapes.from_file(path)) == list(range(1, 11))


def test_file_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A call goes on, and later ones do not even try."""
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        for rows in (5, 6):
            record(tmp_path / "file" / "shapes.toml", Shape(**PLAIN, seqlen_q=rows, seqlen_k=9), Band(None, None))
    (message,) = caplog.messages
    assert "cannot be written" in message


def test_file_that_is_no_text_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is left as it is, and no call ends for it."""
    path = tmp_path / "shapes.toml"
    path.write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        for rows in (5, 6):
            record(path, Shape(**PLAIN, seqlen_q=rows, seqlen_k=9), Band(None, None))
    assert len(caplog.messages) == 1
    assert path.read_bytes() == b"\xff\xfe"


def test_a_full_disk_leaves_no_half_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What no longer fits is not written at all, with one warning; what stands there is still a shapes file."""
    path = tmp_path / "shapes.toml"
    everything = Band(None, None)
    record(path, Shape(**PLAIN, seqlen_q=64, seqlen_k=64), everything)
    before = path.read_text(encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        record(path, Shape(**PLAIN, seqlen_q=128, seqlen_k=128), everything)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text(encoding="utf-8") == before
    assert "cannot be written" in caplog.text
