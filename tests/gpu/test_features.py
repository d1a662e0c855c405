"""Every kind of call at real sizes on a GPU, judged by the gate's own rule: default configs, compiled but not tuned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbias import factors, flash_bias_func, merge_attention, reference
from flashbias.band import Band
from tests.flashbias.cases import Call, assert_within_gate
from tests.flashbias.drawn import default_configs
from tests.flashbias.score_kernel import bias_scores, ulps

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Runs every call with its default configs: what is tested here are the kernels, not the tuner."""
    with default_configs():
        yield


def tensors(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    nheads: int,
    headdim: int = 64,
    *,
    nheads_kv: int | None = None,
    value_dim: int | None = None,
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype | None = None,
    factor_heads: tuple[int, int] | None = None,
    mask: tuple[int, ...] | None = None,
    mask_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Returns leaves that want gradients, well-conditioned as the gate's inputs are."""
    generator = torch.Generator(CUDA).manual_seed(11)

    def normal(*shape: int, size: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=CUDA) * size).to(kind).requires_grad_()

    kv = nheads_kv or nheads
    found: dict[str, Tensor | None] = {
        "q": normal(batch, seqlen_q, nheads, headdim, size=0.5),
        "k": normal(batch, seqlen_k, kv, headdim),
        "v": normal(batch, seqlen_k, kv, value_dim or headdim),
        "q_bias": None,
        "k_bias": None,
        "mask": None,
    }
    if rank:
        heads = factor_heads or (nheads, nheads)
        kind = factor_dtype or dtype
        found["q_bias"] = normal(batch, seqlen_q, heads[0], rank, size=0.5 * rank**-0.25, kind=kind)
        found["k_bias"] = normal(1, seqlen_k, heads[1], rank, size=rank**-0.25, kind=kind)
    if mask:
        found["mask"] = normal(*mask, size=0.5, kind=mask_dtype)
    return found


def judge(given: dict[str, Tensor | None], *, with_lse: bool = False, **switches: Any) -> None:
    """Runs the call forward and backward and holds O, LSE and every gradient to the gate's budget."""
    out, lse = flash_bias_func(**given, return_lse=True, **switches)
    generator = torch.Generator(CUDA).manual_seed(5)
    dout = torch.randn(out.shape, generator=generator, device=CUDA).to(out.dtype)
    dlse = None
    if with_lse:  # away from 0, where dq of a row that sees one key, p · dLSE · k, would be rounding alone
        drawn = torch.randn(lse.shape, generator=generator, device=CUDA)
        dlse = torch.copysign(drawn.abs() + 1, drawn)
    torch.autograd.backward([out, *([lse] if with_lse else [])], [dout, *([dlse] if dlse is not None else [])])
    found = {name: tensor.grad for name, tensor in given.items() if tensor is not None}
    assert all(gradient is not None for gradient in found.values())
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in given.items()}
    assert given["q"] is not None
    call = Call(
        **detached,  # type: ignore[arg-type]
        causal=switches.get("causal", False),
        scale=given["q"].shape[3] ** -0.5,
        window=switches.get("window_size", (-1, -1)),
    )
    assert_within_gate(call, {"out": out, "lse": lse, **found}, dout, torch.zeros_like(lse) if dlse is None else dlse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k_factor_heads", [12, 4, 1])
def test_grouped_queries(k_factor_heads: int, dtype: torch.dtype) -> None:
    """Three query heads share a key head; k_bias is that of each, of the group, or of all."""
    # In fp16 a causal row of two keys may be worse than even the ideal kernel can show.
    causal = dtype == torch.bfloat16
    judge(tensors(2, 777, 901, 12, nheads_kv=4, factor_heads=(12, k_factor_heads), dtype=dtype), causal=causal)


def test_multi_query() -> None:
    """All heads share one key head."""
    judge(tensors(1, 1024, 1024, 16, 128, nheads_kv=1), causal="bottom_right", with_lse=True)


@pytest.mark.parametrize(("rows", "keys"), [(300, 2000), (2000, 300), (1, 4097)])
def test_bottom_right(rows: int, keys: int) -> None:
    """The last query sees the last key; with more queries than keys the first see none."""
    judge(tensors(2, rows, keys, 4, 32, dtype=torch.float16), causal="bottom_right", with_lse=True)


@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
@pytest.mark.parametrize("window", [(100, 0), (0, 0), (1000, 37), (-1, 64), (513, -1)])
def test_windows(window: tuple[int, int], causal: bool | str) -> None:
    """Any window, with and without a causal bound, on lengths that differ."""
    judge(tensors(1, 1500, 1777, 4, 64, nheads_kv=2), causal=causal, window_size=window)


@pytest.mark.parametrize(
    ("headdim", "value_dim", "rank"),
    [(8, 8, 1), (96, 96, 12), (160, 80, 8), (256, 256, 8), (64, 256, 200), (256, 64, 64)],
)
def test_head_dims_and_ranks(headdim: int, value_dim: int, rank: int) -> None:
    """Head dims to 256, a value dim of its own, ranks to 256."""
    judge(tensors(1, 515, 700, 4, headdim, value_dim=value_dim, rank=rank), causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 777, 513), (2, 1, 1, 513), (1, 1, 777, 1), (2, 4, 777, 513), (1, 1, 1, 1)])
def test_mask_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The gradient of an additive mask in its own shape, beside those of everything else."""
    judge(tensors(2, 777, 513, 4, 64, mask=shape, mask_dtype=dtype, dtype=dtype), causal=False)
    judge(tensors(2, 777, 513, 4, 64, nheads_kv=2, mask=shape), causal=True, with_lse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3, 20])
def test_exact_factors(rank: int, dtype: torch.dtype) -> None:
    """fp32 factors beside 16-bit inputs, gradients included, whatever the number of parts fills."""
    judge(tensors(2, 600, 777, 4, 64, rank=rank, dtype=dtype, factor_dtype=torch.float32), causal=True, with_lse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seqlen", [1024, 65536])
def test_alibi_scores_are_within_four_ulp(seqlen: int, dtype: torch.dtype) -> None:
    """GPT-2's 50 heads: the bias of the last queries is as exact as fp32 arithmetic, over all keys."""
    rows = slice(seqlen - 1024, seqlen)
    slopes = factors.alibi_slopes(50, device=CUDA)
    position = torch.arange(seqlen, dtype=torch.float32, device=CUDA)
    for slope in slopes:
        forms = [
            [factor[0, :, 0] for factor in factors.alibi(1, seqlen, slopes=slope[None], device=CUDA)],
            [
                torch.stack([slope.expand(seqlen), -slope * position], -1),
                torch.stack([position, torch.ones_like(position)], -1),
            ],
        ]
        for q_bias, k_bias in forms:
            found = bias_scores(q_bias[rows], k_bias, dtype)
            assert ulps(found, q_bias[rows].double() @ k_bias.double().T) <= 4


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("seqlen", [4096, 65536])
def test_alibi_gradients_are_accurate(seqlen: int, dtype: torch.dtype, limit: float) -> None:
    """dq_bias, dk_bias and the gradient of the slopes against fp64, for a steep, a middle and a shallow head."""
    given = tensors(1, seqlen, seqlen, 3, 64, rank=0, dtype=dtype)
    slopes = (2.0 ** torch.tensor([-1.0, -4.0, -8.0], device=CUDA)).requires_grad_()
    q_bias, k_bias = factors.alibi(3, seqlen, slopes=slopes, device=CUDA)
    q_bias.retain_grad()
    k_bias.requires_grad_()
    given.update(q_bias=q_bias, k_bias=k_bias)
    out = flash_bias_func(**given, causal=True)
    dout = torch.randn(out.shape, generator=torch.Generator(CUDA).manual_seed(5), device=CUDA).to(dtype)
    out.backward(dout)

    inputs = [None if tensor is None else tensor.detach() for tensor in given.values()]
    call = (*inputs, Band(None, 0), 64**-0.5)
    truth, lse = reference.forward(*call, compute_dtype=torch.float64)
    exact = reference.backward(dout, *call, truth, lse, compute_dtype=torch.float64)
    assert exact.dq_bias is not None
    assert q_bias.grad is not None
    assert q_bias.grad.dtype == torch.float32
    pairs = {
        "dq_bias": (q_bias.grad, exact.dq_bias),
        "dk_bias": (k_bias.grad, exact.dk_bias),
        "slopes": (slopes.grad, exact.dq_bias.sum((0, 1, 3))),
        **{f"dq_bias of head {h}": (q_bias.grad[:, :, h], exact.dq_bias[:, :, h]) for h in range(3)},
    }
    errors = {
        name: float((found.double() - right).norm() / right.norm())
        for name, (found, right) in pairs.items()
        if found is not None and right is not None
    }
    assert all(error <= limit for error in errors.values()), errors


def test_scores_far_beyond_what_exp_can_hold() -> None:
    """Logits to ±60, as q times 5 and k times 3 give: softmax puts nearly all weight on one key, and all stays right."""
    given = tensors(2, 500, 600, 4, 64, dtype=torch.float16)
    for name, size in (("q", 10), ("k", 3)):
        tensor = given[name]
        assert tensor is not None
        given[name] = (tensor.detach() * size).requires_grad_()
    judge(given, with_lse=True, causal=True)


def test_three_parts_of_the_keys_merge_into_the_whole() -> None:
    """O and all gradients of keys split three ways are those of the unsplit call, within the gate's budget."""
    whole = tensors(1, 512, 900, 4, 64)
    k, v, k_bias = (whole[name] for name in ("k", "v", "k_bias"))
    assert k is not None
    assert v is not None
    assert k_bias is not None
    parts = [
        flash_bias_func(whole["q"], k[:, cut], v[:, cut], whole["q_bias"], k_bias[:, cut], return_lse=True)  # type: ignore[arg-type]
        for cut in (slice(0, 300), slice(300, 700), slice(700, 900))
    ]
    merged, lse = merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    dout = torch.randn(merged.shape, generator=torch.Generator(CUDA).manual_seed(5), device=CUDA).to(merged.dtype)
    leaves = {name: tensor for name, tensor in whole.items() if tensor is not None}
    gradients = torch.autograd.grad(merged, list(leaves.values()), dout)
    call = Call(**{name: tensor.detach() for name, tensor in leaves.items()}, scale=64**-0.5)  # type: ignore[arg-type]
    found = {"out": merged, "lse": lse, **dict(zip(leaves, gradients, strict=True))}
    assert_within_gate(call, found, dout, torch.zeros_like(lse))


def test_backward_needs_no_memory_of_all_scores() -> None:
    """At 32,768 positions the peak is inputs, outputs, gradients and a few numbers for each row."""
    given = tensors(1, 32768, 32768, 4, 64)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = flash_bias_func(**given, causal=True)  # type: ignore[arg-type]
    out.backward(out.detach())
    needed = sum(
        2 * tensor.nbytes for tensor in given.values() if tensor is not None
    )  # gradients, and room to sum them
    rows = 4 * 32768
    assert torch.cuda.max_memory_allocated() - held <= 2 * needed + rows * 4 * 64
