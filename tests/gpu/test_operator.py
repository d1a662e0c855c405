"""The operator on a real GPU: tuned, remembered, launched from threads and graphs, and right on every kind of input."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune import forget
from autotune.device import describe
from cache_db.models import Winner
from cache_db.store import Store
from flashbias import flash_bias_func, launcher, plans, reference
from flashbias.band import CAUSAL, EVERYTHING
from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION
from flashbias.settings import current, settings
from tests.flashbias.cases import Call, assert_within_gate

CUDA = torch.device("cuda")
TUNED = {"batch": 2, "nheads": 3, "seqlen_q": 500, "seqlen_k": 500, "headdim": 64, "rank": 8, "causal": True}
SCRIPT = """
import torch
from cache_db.store import Store
from flashbias import flash_bias_func
from flashbias.settings import current
from tests.gpu.test_operator import TUNED, make
store = Store.open(current().cache_dir / "flashbias.db")
before = store.counts()
tensors = make(**TUNED)
out = flash_bias_func(*tensors[:5], causal=True)
out.backward(tensors[5])
assert store.counts() == before, (before, store.counts())
torch.save([out.detach()] + [t.grad for t in tensors[:5]], "result.pt")
"""


def make(
    batch: int,
    nheads: int,
    seqlen_q: int,
    seqlen_k: int,
    headdim: int,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    **_: Any,
) -> list[Tensor]:
    """Returns q, k, v, q_bias, k_bias (leaves) and dO, the same in every process."""
    generator = torch.Generator(CUDA).manual_seed(7)

    def normal(rows: int, columns: int, size: float = 1.0) -> Tensor:
        values = torch.randn(batch, rows, nheads, columns, generator=generator, device=CUDA) * size
        return values.to(dtype).requires_grad_()

    q, k, v = normal(seqlen_q, headdim, 0.5), normal(seqlen_k, headdim), normal(seqlen_k, headdim)
    factors = normal(seqlen_q, rank, 0.5 * rank**-0.25), normal(seqlen_k, rank, rank**-0.25)
    return [q, k, v, *factors, normal(seqlen_q, headdim).detach()]


def assert_right(tensors: list[Tensor], out: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> None:
    """Judges O and all gradients by the gate's own rule."""
    *inputs, dout = [tensor.detach() for tensor in tensors]
    q, k, v, q_bias, k_bias = inputs
    call = Call(q, k, v, q_bias, k_bias, None if mask is None else mask.detach(), causal, q.shape[3] ** -0.5)
    learning = [] if mask is None or not mask.requires_grad else [mask]
    leaves = zip(GRADIENTS, [*tensors[:5], *learning], strict=False)
    found = {"out": out, **{name: tensor.grad for name, tensor in leaves}}
    assert all(value is not None for value in found.values())
    no_dlse = torch.zeros((q.shape[0], q.shape[2], q.shape[1]), device=q.device)
    assert_within_gate(call, found, dout, no_dlse)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def tuned() -> None:
    """Tunes one problem with all gradients, through the public call, from an empty database."""
    tensors = make(**TUNED)
    with settings(implementations=("triton",)):
        flash_bias_func(*tensors[:5], causal=True)


def test_the_first_call_leaves_winners_of_every_kernel_in_the_database() -> None:
    """All three kernels, none for a mask, have a level-2 winner, chosen among dozens of trials, each with a verdict."""
    store = Store.open(Path(current().cache_dir or "") / "flashbias.db")
    found = problem(Shape(**TUNED, dtype="bfloat16", grads=GRADIENTS), describe(0))
    winners = store.winners(found)
    judged = {kernel: (winner.level >= 2, winner.tried >= 10) for kernel, winner in winners.items()}
    assert judged == dict.fromkeys(("forward", "backward_dq", "backward_dkdv"), (True, True))
    assert len(store.trials(found)) >= 30


def test_tuned_results_are_right_and_bitwise_repeatable() -> None:
    """O and five gradients pass the gate's rule, and 300 further runs give the same bits."""
    tensors = make(**TUNED)
    out = flash_bias_func(*tensors[:5], causal=True)
    out.backward(tensors[5])
    assert_right(tensors, out, causal=True)
    first = [out.detach(), *(tensor.grad.clone() for tensor in tensors[:5])]
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(300):
        again = flash_bias_func(*tensors[:5], causal=True)
        gradients = torch.autograd.grad(again, tensors[:5], tensors[5])
        for one, other in zip(first, (again, *gradients), strict=True):
            differing += one.ne(other).sum()
    assert int(differing) == 0


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float16, 2), (torch.bfloat16, 16)])
def test_alibi_is_right_with_all_gradients(dtype: torch.dtype, rank: int) -> None:
    """Factors that hold positions up to 1,024 beside a spread of a few keep their gradients, also without a spare column."""
    seqlen, nheads, headdim = 1024, 8, 64
    tensors = make(1, nheads, seqlen, seqlen, headdim, rank, dtype)
    position = torch.arange(seqlen, device=CUDA, dtype=torch.float32)[:, None]
    slopes = torch.logspace(-2, -8, nheads, base=2.0, device=CUDA)
    with torch.no_grad():
        tensors[3][..., 0], tensors[3][..., 1] = slopes, -slopes * position
        tensors[4][..., 0], tensors[4][..., 1] = position, 1.0
    out = flash_bias_func(*tensors[:5], causal=True)
    out.backward(tensors[5])
    assert_right(tensors, out, causal=True)
    truth = reference.backward(
        tensors[5],
        *tensors[:5],
        None,
        CAUSAL,
        headdim**-0.5,
        *reference.forward(*tensors[:5], None, CAUSAL, headdim**-0.5, compute_dtype=torch.float64),
        compute_dtype=torch.float64,
    )
    assert truth.dq_bias is not None
    assert tensors[3].grad is not None
    off = (tensors[3].grad.double() - truth.dq_bias)[..., 0].norm() / truth.dq_bias[..., 0].norm()
    assert off <= (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_lse_does_not_drift_with_the_number_of_key_tiles(causal: bool) -> None:
    """Over hundreds of tiles the online softmax stays right to a few fp32 ulp: 16,384 keys, with the default configs."""
    q, k, v, q_bias, k_bias, _ = make(1, 1, 16384, 16384, 64, 8)
    with torch.no_grad(), settings(mode="read"):
        call = (q, k, v, q_bias, k_bias, None, CAUSAL if causal else EVERYTHING, 0.125)
        _, lse = launcher.forward(*call)
        _, truth = reference.forward(*call, compute_dtype=torch.float64)
    assert float((lse - truth).abs().max()) < 4e-6


def test_a_second_process_sweeps_nothing_writes_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    """Winners are launched straight from the database."""
    tensors = make(**TUNED)
    out = flash_bias_func(*tensors[:5], causal=True)
    out.backward(tensors[5])
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "tuning" not in done.stderr
    for mine, other in zip([out, *(t.grad for t in tensors[:5])], torch.load(tmp_path / "result.pt"), strict=True):
        assert torch.equal(mine, other)


def test_descriptor_kernels_run_backward_through_autograd_and_from_a_second_thread() -> None:
    """Descriptors need scratch from an allocator that autograd's threads do not see; the launcher brings its own."""
    shape = Shape(**{**TUNED, "headdim": 32}, dtype="bfloat16", grads=GRADIENTS)
    device = describe(0)
    found = problem(shape, device)
    store = Store.open(Path(current().cache_dir or "") / "flashbias.db")
    proven: dict[str, str] = {}
    for kernel in ATTENTION.kernels(found):
        config = space.config(space.DESCRIPTORS, 64, 64, 4, 2)
        store.put_winner(
            Winner(
                problem=found,
                kernel=kernel,
                config=config,
                level=2,
                ms=1.0,
                tried=1,
                total=1,
                complete=True,
                proven_with=dict(proven),
                binary=compile_kernel(kernel, config, found, device).binary,
                environment=device.environment,
                created_at=time.time(),
            )
        )
        proven[kernel] = config.hash
    tensors = make(**{**TUNED, "headdim": 32})
    out = flash_bias_func(*tensors[:5], causal=True)
    plan = next(
        plan
        for plan in plans._latest.values()
        if plan.binaries and plan.binaries["forward"].constants["HEAD_DIM"] == 32
    )
    assert all(binary.constants["DESCRIPTORS"] for binary in plan.binaries.values())
    thread = threading.Thread(target=out.backward, args=(tensors[5],))
    thread.start()
    thread.join()
    assert_right(tensors, out, causal=True)


@pytest.mark.parametrize(
    "kind", ["unaligned", "transposed", "odd head dim", "bool mask", "additive mask", "shared factors"]
)
def test_every_kind_of_input_is_right_on_the_ladders_default(kind: str) -> None:
    """Without tuning, the default config is proven quickly and used, whatever the strides, masks and broadcasts."""
    sizes: dict[str, Any] = {**TUNED, "seqlen_q": 203, "seqlen_k": 331, "causal": False, "dtype": torch.float16}
    if kind == "odd head dim":
        sizes["headdim"] = 20
    tensors = make(**sizes)
    mask = None
    if kind == "unaligned":
        tensors = [_shifted(tensor) for tensor in tensors]
    if kind == "transposed":
        tensors = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in tensors]
    if kind == "shared factors":
        tensors[3:5] = [tensor.detach()[:1, :, :1].clone().requires_grad_() for tensor in tensors[3:5]]
    if "mask" in kind:
        mask = torch.rand(1, 3, 203, 331, device=CUDA) > 0.3
        mask[:, :, ::9] = False
        if kind == "additive mask":
            mask = torch.where(mask, torch.randn_like(mask, dtype=torch.float32) * 0.3, -torch.inf).requires_grad_()
    with settings(mode="read"):
        out = flash_bias_func(*tensors[:5], mask)
        out.backward(tensors[5].detach())
    assert any(plan.binaries for plan in plans._latest.values())
    assert_right(tensors, out, mask)


def _shifted(tensor: Tensor) -> Tensor:
    """Returns the values in memory that starts off a 16-byte boundary."""
    room = torch.empty((*tensor.shape[:3], tensor.shape[3] + 3), dtype=tensor.dtype, device=CUDA)
    return room[..., 1:-2].copy_(tensor.detach()).requires_grad_()


def test_more_heads_than_a_grid_dimension_holds() -> None:
    """B·H beyond 65,535 is one launch."""
    tensors = make(2, 33_000, 17, 19, 16, 8, torch.float16)
    with settings(mode="read"):
        out = flash_bias_func(*tensors[:5])
        out.backward(tensors[5])
    assert_right(tensors, out)


def test_a_tuned_call_can_be_captured_and_an_untuned_one_runs_eager_in_capture() -> None:
    """Nothing is tuned during capture, and a captured call replays to the same bits."""
    tensors = [tensor.detach() for tensor in make(**TUNED)]
    with torch.no_grad(), settings(mode="read"):
        expected = flash_bias_func(*tensors[:5], causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash_bias_func(*tensors[:5], causal=True)
        graph.replay()
        assert torch.equal(out, expected)
        forget()
        plans.forget()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            flash_bias_func(*tensors[:5], causal=True)
        assert not plans._plans


def test_forward_and_backward_can_be_captured_with_exact_factors() -> None:
    """fp32 factors beside bf16 inputs: a captured training step replays to the same gradients, nothing allocated by it."""
    tensors = make(**TUNED)
    leaves = [*tensors[:3], *(tensor.detach().float().requires_grad_() for tensor in tensors[3:5])]

    def step() -> tuple[Tensor, ...]:
        out, lse = flash_bias_func(*leaves, causal=True, return_lse=True)
        return torch.autograd.grad((out, lse), leaves, (tensors[5], torch.ones_like(lse)))

    stream = torch.cuda.Stream()
    with settings(mode="read"), torch.cuda.stream(stream):
        expected = step()  # the default config is proven, and autograd is warm on this stream
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for gradient in captured:
            gradient.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
