"""Foreign implementations on a GPU: each backend's op as we call it, the gate's word on it, and the tuner's choice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autotune
from autotune import Settings, resolve
from autotune.device import describe
from autotune.gate.proof import prove
from autotune.gate.rig import Rig
from cache_db import open_layers
from cache_db.models import Config, Verdict
from flashbias import flash_bias_func, plans, reference
from flashbias.band import band as band_of
from flashbias.implementations import rules
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION
from flashbias.settings import settings

pytestmark = pytest.mark.timeout(600)

CUDA = "cuda"
SHAPE = Shape(batch=2, nheads=8, seqlen_q=2048, seqlen_k=2048, headdim=64, rank=8, dtype="bfloat16")
TRAINED = SHAPE.model_copy(update={"grads": ("q", "k", "v", "k_bias")})
BANDS = [(203, 203, False), (203, 203, True), (130, 331, "bottom_right"), (331, 130, "bottom_right"), (331, 130, True)]
# Those of torch itself, which have to be there; flash-attn-4 where it is installed.
SDPA_FORWARDS = ("cudnn", "flash", "efficient")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    plans.forget()
    yield
    autotune.forget()
    plans.forget()


def configs(kernel: str, shape: Shape) -> dict[str, Config]:
    """Returns the foreign configs that the rules let compute ``kernel`` here, by name."""
    device = describe(0)
    found = problem(shape, device)
    return {
        f"{each.implementation}-{each.variant}": each
        for each in rules.candidates(kernel, device)
        if rules.rejects(kernel, each, found, device) is None
    }


def make(rows: int, keys: int, head_dim: int, dtype: torch.dtype, rank: int = 8) -> dict[str, Tensor]:
    """Returns the operator's tensors, dout and dlse."""
    generator = torch.Generator(CUDA).manual_seed(5)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=CUDA) * 0.5).to(kind)

    found = {"q": normal(2, rows, 3, head_dim), "k": normal(2, keys, 3, head_dim), "v": normal(2, keys, 3, head_dim)}
    found |= {"q_bias": normal(1, rows, 3, rank), "k_bias": normal(2, keys, 1, rank)}
    return {**found, "dout": normal(2, rows, 3, head_dim), "dlse": normal(2, 3, rows, kind=torch.float32)}


def off(value: Tensor, right: Tensor) -> float:
    """Returns the relative error of the whole tensor, where ``right`` is finite."""
    seen = right.isfinite()
    return float((value.double() - right)[seen].norm() / right[seen].norm().clamp(min=1e-30))


def test_torchs_backends_are_all_there() -> None:
    """On a GPU of this kind a torch of this kind offers every backend's forward, and the efficient backward."""
    assert {f"sdpa-{variant}" for variant in SDPA_FORWARDS} <= set(configs("forward", SHAPE))
    assert "sdpa-efficient" in configs("backward", TRAINED)


@pytest.mark.parametrize(("rows", "keys", "causal"), BANDS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_forwards_are_the_oracles(rows: int, keys: int, causal: Any, head_dim: int) -> None:
    """O and natural LSE of every backend, for any band, with LSE's -inf and O's zeros where a row has no key."""
    shape = SHAPE.model_copy(update={"headdim": head_dim, "causal": causal, "seqlen_q": rows, "seqlen_k": keys})
    tensors = make(rows, keys, head_dim, torch.bfloat16)
    call = [tensors[name] for name in ("q", "k", "v", "q_bias", "k_bias")]
    seen, scale = band_of(causal, (-1, -1), rows, keys), head_dim**-0.5
    right, right_lse = reference.forward(*call, None, seen, scale, compute_dtype=torch.float64)
    errors = {}
    for name, config in configs("forward", shape).items():
        out, lse = rules.compiled(config, describe(0)).load().forward(*call, seen, scale)
        assert out.is_contiguous(), name
        assert torch.equal(lse == -torch.inf, right_lse == -torch.inf), name
        assert not out[(right_lse == -torch.inf).transpose(1, 2)].any(), name
        errors[name] = (off(out, right), float((lse.double() - right_lse)[right_lse.isfinite()].abs().max()))
    assert errors
    assert all(error < 1e-2 and nats < 2e-3 for error, nats in errors.values()), errors


@pytest.mark.parametrize(("rows", "keys", "causal"), BANDS, ids=str)
@pytest.mark.parametrize("forward", ["ours", "theirs"])
def test_backwards_are_the_oracles(rows: int, keys: int, causal: Any, forward: str) -> None:
    """All gradients, with one of LSE, behind a foreign forward and behind what is rounded from the oracle's; twice equal."""
    shape = TRAINED.model_copy(update={"causal": causal, "seqlen_q": rows, "seqlen_k": keys})
    tensors = make(rows, keys, 64, torch.bfloat16)
    call = [tensors[name] for name in ("q", "k", "v", "q_bias", "k_bias")]
    seen, dout = band_of(causal, (-1, -1), rows, keys), tensors["dout"]
    right, right_lse = reference.forward(*call, None, seen, 0.125, compute_dtype=torch.float64)
    how: dict[str, Any] = {"compute_dtype": torch.float64, "dlse": tensors["dlse"]}
    truth = reference.backward(dout, *call, None, seen, 0.125, right, right_lse, **how)._asdict()
    given = right.to(torch.bfloat16), right_lse.float()
    errors = {}
    for name, config in configs("backward", shape).items():
        run = rules.compiled(config, describe(0)).load()
        if forward == "theirs":
            given = run.forward(*call, seen, 0.125)
        found, again = (run.backward(dout, *call, *given, seen, 0.125, tensors["dlse"]) for _ in range(2))
        assert all(torch.equal(value, again[each]) for each, value in found.items()), name
        for each, value in found.items():
            errors[f"{name} {each}"] = off(value.sum_to_size(truth[each].shape), truth[each])
    assert errors
    assert all(error < 2e-2 for error in errors.values()), errors


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gate_has_its_say_on_every_backend(causal: bool, dtype: str, record_property: Any) -> None:
    """At least one forward passes all cases and 300 repeats; none crashes; what is wrong is recorded with its reason."""
    device = describe(0)
    shape = TRAINED.model_copy(update={"causal": causal, "dtype": dtype})
    found = problem(shape, device)
    rig = Rig(ATTENTION, found, device)
    through = {"forward": ATTENTION.default("forward", found, device)}
    verdicts: dict[str, Verdict] = {}
    for kernel, behind in (("forward", {}), ("backward", through)):
        for name, config in configs(kernel, shape).items():
            proof = prove(rig, kernel, config, behind, level=2, seed=0)
            verdicts[f"{kernel} {name}"] = proof.verdict
            record_property(f"{kernel} {name}", f"{proof.verdict} {proof.reason} {proof.figures}")
            print(kernel, name, proof.verdict, proof.reason, proof.figures)  # noqa: T201 - for who reads -s
    assert set(verdicts.values()) <= {Verdict.SAFE, Verdict.WRONG, Verdict.RACY}, verdicts
    assert Verdict.SAFE in {verdict for name, verdict in verdicts.items() if name.startswith("forward")}, verdicts


@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient"])
def test_a_backend_replays_from_a_graph(name: str) -> None:
    """Each forward can be captured, as candidates are timed and users capture their steps; the replay's bits are the call's."""
    config = configs("forward", SHAPE)[name]
    run = rules.compiled(config, describe(0)).load()
    tensors = make(256, 256, 64, torch.bfloat16)
    call = [tensors[each] for each in ("q", "k", "v", "q_bias", "k_bias")]
    seen = band_of(True, (-1, -1), 256, 256)
    expected = run.forward(*call, seen, 0.125)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run.forward(*call, seen, 0.125)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_tuner_chooses_among_all(tmp_path: Path, record_property: Any) -> None:
    """Every implementation has a verdict and a time of device and host; the winner is the fastest that is safe."""
    device = describe(0)
    found = problem(TRAINED, device)
    resolution = resolve(found, device, Settings(cache_dir=tmp_path, budget_seconds=120))
    assert resolution.won, resolution.reason
    record_property("chosen", str({kernel: str(choice.config) for kernel, choice in resolution.choices.items()}))
    store = open_layers(tmp_path)
    trials = store.trials(found, "forward")
    assert {each.config.implementation for each in trials} >= {"triton", "sdpa"}
    safe = [each for each in trials if each.verdict is Verdict.SAFE and each.level >= 2]
    assert all(float(each.figures["host_ms"]) > 0 for each in safe)
    best = min(float(each.figures["ms"]) for each in safe)
    (winner,) = (each for each in safe if each.config == resolution.choices["forward"].config)
    assert float(winner.figures["ms"]) <= 1.1 * best
    assert {each.config.implementation for each in store.trials(found, "backward")} >= {"sdpa"}
    autotune.forget()
    ours = resolve(found, device, Settings(mode="assert", cache_dir=tmp_path, implementations=("triton",)))  # type: ignore[arg-type]
    assert {choice.config.implementation for choice in ours.choices.values()} == {"triton"}


MIXES: list[Mapping[str, tuple[str, ...]]] = [
    {"forward": ("sdpa",), "backward": ("triton",)},
    {"forward": ("triton",), "backward": ("sdpa",)},
]


@pytest.mark.parametrize(("mix", "compiled"), list(itertools.product(MIXES, [False, True])), ids=str)
def test_mixed_calls_are_right(tmp_path: Path, mix: Mapping[str, tuple[str, ...]], compiled: bool) -> None:
    """A foreign forward with our backward, and the reverse, pinned after a sweep, plain and under torch.compile."""
    device = describe(0)
    shape = TRAINED.model_copy(update={"seqlen_q": 512, "seqlen_k": 512, "batch": 2, "nheads": 3})
    found = problem(shape, device)
    chosen = {"cache_dir": tmp_path, "budget_seconds": 60}
    assert resolve(found, device, Settings(**chosen)).won
    store = open_layers(tmp_path)
    for kernel, (implementation,) in mix.items():
        kernels = ["backward_dq", "backward_dkdv"] if (kernel, implementation) == ("backward", "triton") else [kernel]
        for each in kernels:
            rows = [row for row in store.trials(found, each) if row.config.implementation == implementation]
            (row, *_) = sorted(
                (row for row in rows if row.verdict is Verdict.SAFE and row.level >= 2),
                key=lambda row: float(row.figures["ms"]),
            )
            store.put_pin(pin(row.problem, each, row.config))
    autotune.forget()
    tensors = make(512, 512, 64, torch.bfloat16)
    call = [tensors[name].requires_grad_(name != "q_bias") for name in ("q", "k", "v", "q_bias", "k_bias")]
    run = torch.compile(flash_bias_func) if compiled else flash_bias_func
    with settings(**chosen):
        out = run(*call)
        gradients = torch.autograd.grad(out, [call[0], call[1], call[2], call[4]], tensors["dout"])
    (plan,) = plans._latest.values()
    assert set(plan.foreign) == {kernel for kernel, (implementation,) in mix.items() if implementation == "sdpa"}
    plain = [tensor.detach() for tensor in call]
    seen = band_of(False, (-1, -1), 512, 512)
    right, lse = reference.forward(*plain, None, seen, 0.125, compute_dtype=torch.float64)
    truth = reference.backward(tensors["dout"], *plain, None, seen, 0.125, right, lse, compute_dtype=torch.float64)
    assert off(out.detach(), right) < 1e-2
    for value, expected in zip(gradients, (truth.dq, truth.dk, truth.dv, truth.dk_bias), strict=True):
        assert expected is not None
        assert off(value, expected) < 2e-2


def pin(found: Any, kernel: str, config: Config) -> Any:
    """Returns the pin of a config."""
    from cache_db.models import Pin

    return Pin(problem=found, kernel=kernel, config=config, pinned_by="test", host="here", created_at=1.0)
