"""Foreign implementations at work: the gate's word on them, and that each feeds our kernels and back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autotune
from autotune.device import DeviceInfo, describe, interpreting
from autotune.gate.proof import Proof, prove
from autotune.gate.rig import Rig
from cache_db import open_layers
from cache_db.models import Config, Problem, Trial, Verdict, Winner
from flashbias import flash_bias_func, plans, reference
from flashbias.band import Band
from flashbias.band import band as band_of
from flashbias.cli.main import main
from flashbias.implementations import rules, sdpa
from flashbias.implementations.foreign import Foreign
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION, AttentionSpec
from flashbias.settings import settings
from tests.flashbias.test_implementations import SHAPE, TRAINED

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in the interpreter (TRITON_INTERPRET=1)")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process, and leaves nothing decided behind."""
    autotune.forget()
    plans.forget()
    yield
    autotune.forget()
    plans.forget()


class HalfNats(sdpa.OnCpu):
    """A backend whose LSE is off by a hundredth."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O and what is not quite LSE."""
        out, lse = super().forward(q, k, v, scale, causal=causal)
        return out, lse * 1.01


class ZeroedRow(sdpa.OnCpu):
    """A backend that forgets the last key's gradient of v."""

    def backward(self, *given: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk and a dv with a row of zeros."""
        dq, dk, dv = super().backward(*given, **more)
        dv[:, -1] = 0
        return dq, dk, dv


class Planted(AttentionSpec):
    """Attention whose foreign configs run a backend of the test's own."""

    def __init__(self, backend: sdpa.OnCpu) -> None:
        self._backend = backend

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Any:
        """Returns the planted one for a foreign config."""
        made = super().compile(kernel, config, problem, device)
        return replace(made, backend=self._backend) if isinstance(made, Foreign) else made


def judged(spec: AttentionSpec, shape: Shape, kernel: str, through: Mapping[str, Config] | None = None) -> Proof:
    """Returns what the gate says of the CPU's foreign config."""
    device = describe(-1)
    found = problem(shape, device)
    (foreign,) = rules.candidates(kernel, device)
    return prove(Rig(spec, found, device), kernel, foreign, through or {}, level=2, seed=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("forward", ["sdpa", "triton"])
def test_the_gate_proves_what_is_right(causal: bool, forward: str) -> None:
    """Forward and backward pass every case, the backward behind its own forward and behind ours."""
    shape = TRAINED.model_copy(update={"causal": causal})
    device = describe(-1)
    ours = ATTENTION.default("forward", problem(shape, device), device)
    (foreign,) = rules.candidates("forward", device)
    proof = judged(ATTENTION, shape, "forward")
    assert proof.verdict is Verdict.SAFE, proof.reason
    proof = judged(ATTENTION, shape, "backward", {"forward": foreign if forward == "sdpa" else ours})
    assert proof.verdict is Verdict.SAFE, proof.reason
    assert proof.figures.keys() >= {"dq_ratio", "dk_ratio", "dv_ratio", "dk_bias_ratio"}


def test_the_gate_rejects_a_wrong_foreign_implementation() -> None:
    """An LSE that is one per cent off, and a forgotten row, are found and named."""
    proof = judged(Planted(HalfNats()), SHAPE, "forward")
    assert (proof.verdict, "'lse' is off" in proof.reason) == (Verdict.WRONG, True)
    (foreign,) = rules.candidates("forward", describe(-1))
    proof = judged(Planted(ZeroedRow()), TRAINED, "backward", {"forward": foreign})
    assert (proof.verdict, "'dv' is off" in proof.reason) == (Verdict.WRONG, True)


def test_sdpas_gradient_of_q_bias_is_held_to_ours() -> None:
    """Factors that are large next to their spread are recentred by our kernels only: in bf16 theirs are not good enough."""
    shape = SHAPE.model_copy(update={"grads": ("q", "k", "v", "q_bias", "k_bias"), "rank": 8})
    (foreign,) = rules.candidates("forward", describe(-1))
    proof = judged(ATTENTION, shape, "backward", {"forward": foreign})
    assert (proof.verdict, "'dq_bias' is off" in proof.reason) == (Verdict.WRONG, True)
    assert "positions" in proof.reason


def stored(folder: Path, shape: Shape, **chosen: str) -> Problem:
    """Stores proven winners of these implementations for the shape, as a sweep would have."""
    device = describe(-1)
    found = problem(shape, device)
    configs: dict[str, Config] = {}
    for kernel, implementation in chosen.items():
        if implementation == "sdpa":
            (configs[kernel],) = rules.candidates(kernel, device)
        else:
            configs[kernel] = ATTENTION.default(kernel, found, device)
    for kernel, each in configs.items():
        needed = [name for name in configs if name in ATTENTION.depends_on(kernel, found)]
        binary = ATTENTION.compile(kernel, each, found, device).binary
        open_layers(folder).put_winner(
            Winner(
                problem=found,
                kernel=kernel,
                config=each,
                level=2,
                ms=1.0,
                tried=1,
                total=1,
                complete=True,
                proven_with={name: configs[name].hash for name in needed},
                binary=binary,
                environment=device.environment,
                created_at=time.time(),
            )
        )
    return found


def make(shape: Shape) -> list[Tensor]:
    """Returns q, k, v, q_bias, k_bias that want the shape's gradients."""
    generator = torch.Generator().manual_seed(3)

    def normal(rows: int, nheads: int, columns: int) -> Tensor:
        return (torch.randn(1, rows, nheads, columns, generator=generator) * 0.5).bfloat16()

    sizes = (
        (shape.seqlen_q, 2, 16),
        (shape.seqlen_k, 2, 16),
        (shape.seqlen_k, 2, 16),
        (shape.seqlen_q, 2, 3),
        (shape.seqlen_k, 1, 3),
    )
    names = ("q", "k", "v", "q_bias", "k_bias")
    return [normal(*size).requires_grad_(name in shape.grads) for name, size in zip(names, sizes, strict=True)]


def assert_right(tensors: list[Tensor], out: Tensor, gradients: list[Tensor | None], dout: Tensor, seen: Band) -> None:
    """Compares O and the gradients with the fp64 reference."""
    call = (*(tensor.detach() for tensor in tensors), None, seen, 0.25)
    truth, lse = reference.forward(*call, compute_dtype=torch.float64)
    right = reference.backward(dout, *call, truth, lse, compute_dtype=torch.float64)[:5]
    for value, expected in zip([out, *gradients], [truth, *right], strict=True):
        if value is not None:
            assert value.shape == expected.shape
            torch.testing.assert_close(value.double(), expected, rtol=5e-2, atol=2e-2)


MIXES = [
    {"forward": "sdpa", "backward_dq": "triton", "backward_dkdv": "triton"},
    {"forward": "triton", "backward": "sdpa"},
    {"forward": "sdpa", "backward": "sdpa"},
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(mix.values()))
@pytest.mark.parametrize("traced", [False, True])
def test_any_forward_feeds_any_backward(tmp_path: Path, mix: dict[str, str], traced: bool) -> None:
    """Stored winners of both kinds run together, in a plain call and in the ops that a compiled graph holds."""
    shape = TRAINED.model_copy(update={"seqlen_q": 20, "seqlen_k": 27})
    stored(tmp_path, shape, **{"backward_dq": "triton", "backward_dkdv": "triton"} | mix)
    if "backward" not in mix:
        assert "backward" not in open_layers(tmp_path).winners(problem(shape, describe(-1)))
    tensors = make(shape)
    with settings(mode="assert", cache_dir=tmp_path):
        if traced:
            grads = [tensor.requires_grad for tensor in tensors] + [False]
            out, _ = torch.ops.flashbias.attention_forward(*tensors, None, None, None, 0.25, grads, "default")
        else:
            out = flash_bias_func(*tensors)
        dout = torch.randn_like(out)
        out.backward(dout)
    (plan,) = plans._latest.values()
    ran = {**dict.fromkeys(plan.binaries, "triton"), **dict.fromkeys(plan.foreign, "sdpa")}
    assert ran == mix
    assert_right(tensors, out, [tensor.grad for tensor in tensors], dout, Band(None, None))


def test_a_call_that_does_not_suit_takes_ours(tmp_path: Path) -> None:
    """A bound that the CPU's backend would need rows of zeros for runs our next safe row, and other calls the winner."""
    shape = SHAPE.model_copy(update={"causal": True, "seqlen_q": 20, "seqlen_k": 27})
    found = stored(tmp_path, shape, forward="sdpa")
    ours = ATTENTION.default("forward", found, describe(-1))
    store_trial(tmp_path, found, ours)
    with settings(mode="assert", cache_dir=tmp_path):
        tensors = make(shape)
        for causal, foreign in ((True, {"forward"}), ("bottom_right", set())):
            out = flash_bias_func(*tensors, causal=causal)
            (plan,) = plans._latest.values()
            assert (set(plan.foreign), plan.eager) == (foreign, False)
            seen = band_of(causal, (-1, -1), 20, 27)
            assert_right(tensors, out, [None] * 5, torch.zeros_like(out), seen)


def store_trial(folder: Path, found: Problem, each: Config) -> None:
    """Stores a safe trial of a forward, as the sweep that it lost."""
    device = describe(-1)
    open_layers(folder).add_trial(
        Trial(
            problem=found,
            kernel="forward",
            config=each,
            verdict=Verdict.SAFE,
            level=2,
            figures={"ms": 2.0},
            environment=device.environment,
            gpu_uuid="",
            host="here",
            created_at=time.time(),
            seconds=1.0,
        )
    )


def test_a_named_implementation_is_swept_stored_shown_verified_and_pinned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first call to the commands: such a row is like any other, and its binary is the digest of its identity."""
    shape = SHAPE.model_copy(update={"seqlen_q": 40, "seqlen_k": 40})
    with settings(implementations=("sdpa",), cache_dir=tmp_path):
        flash_bias_func(*make(shape))
    (plan,) = plans._latest.values()
    assert set(plan.foreign) == {"forward"}
    found = problem(shape, describe(-1))
    winner = open_layers(tmp_path).winners(found)["forward"]
    (trial,) = open_layers(tmp_path).trials(found, "forward")
    assert trial.binary == winner.binary == winner.config.hash == plan.foreign["forward"].binary
    folder = ("--cache-dir", str(tmp_path))
    assert main(["trials", "--format", "csv", *folder]) == 0
    assert "sdpa,flash" in capsys.readouterr().out
    key, name = found.key("forward")[:12], winner.config.hash[:12]
    assert main(["verify", "--key", key, "--config", name, *folder]) == 0
    assert main(["verify", "--all", *folder]) == 0
    assert "1 of 1 winners are safe" in capsys.readouterr().out
    assert main(["pin", "--key", key, "--config", name, *folder]) == 0
    autotune.forget()
    with settings(mode="assert", cache_dir=tmp_path) as chosen:
        assert autotune.resolve(found, describe(-1), chosen).choices["forward"].rung == "pinned"
