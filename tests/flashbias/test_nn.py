"""The attention layer beside the same in plain PyTorch with a dense bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashbias
from flashbias.errors import ArgumentError
from flashbias.factors import NeuralFactors, alibi, from_dense, squared_distance
from flashbias.nn import AlibiBias, FlashBiasAttention, PositionBias
from flashbias.settings import settings
from tests.flashbias.factor_cases import normal, product

ROWS, KEYS, EMBED = 11, 14, 24
# A vector added to all keys, or to k_bias, moves all scores of a row alike, which no softmax sees: no gradient.
UNSEEN = {"key.bias", "bias.builder.phi_k.output.bias"}


def layer(nheads: int = 4, *, dtype: torch.dtype = torch.float64, **options: Any) -> FlashBiasAttention:
    """Returns a layer for ``EMBED`` channels whose projections are the same each time, and its bias as given."""
    module = FlashBiasAttention(EMBED, nheads, **options).to(dtype)
    projections = nn.ModuleList([module.query, module.key, module.value, module.out])
    with torch.no_grad():
        for seed, parameter in enumerate(projections.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) / 3)
    return module


def relative(rows: int = ROWS, keys: int = ROWS) -> Tensor:
    """Returns j - i, (rows, keys) in fp64."""
    return torch.arange(keys, dtype=torch.float64) - torch.arange(rows, dtype=torch.float64)[:, None]


def plain(module: FlashBiasAttention, x: Tensor, context: Tensor, bias: Tensor, seen: Tensor | None = None) -> Tensor:
    """Returns what the layer should: softmax of all scores, a dense ``bias``, and -inf where not ``seen``."""
    projected = module.query(x), module.key(context), module.value(context)
    q, k, v = (part.reshape(*part.shape[:2], -1, module.headdim).transpose(1, 2) for part in projected)
    k, v = (part.repeat_interleave(module.nheads // module.nheads_kv, 1) for part in (k, v))
    scores = q @ k.mT / module.headdim**0.5 + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return module.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def assert_same(module: nn.Module, out: Tensor, expected: Tensor) -> None:
    """Asserts equal outputs and equal gradients of every parameter of the layer, none of them all zero."""
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    names, leaves = zip(*module.named_parameters(), strict=True)
    dout = normal(*out.shape, seed=9)
    got, wanted = (torch.autograd.grad(o, leaves, dout, retain_graph=True) for o in (out, expected))
    for name, gradient, right in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert name in UNSEEN or right.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, None),
        ({"causal": True}, relative() <= 0),
        ({"window_size": (3, 1)}, (relative() >= -3) & (relative() <= 1)),
        ({"causal": True, "window_size": (4, -1)}, (relative() <= 0) & (relative() >= -4)),
        ({"headdim": 5}, None),
        ({"nheads_kv": 2, "causal": True}, relative() <= 0),
        ({"nheads_kv": 1}, None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_self_attention_is_plain_attention(options: dict[str, Any], seen: Tensor | None) -> None:
    """Outputs and all gradients, those of learnable slopes too, are those of a softmax with the dense ALiBi bias."""
    bias = AlibiBias(4, learnable=True)
    module = layer(bias=bias, **options)
    x = normal(2, ROWS, EMBED, seed=5)
    dense = bias.slopes[:, None, None] * relative()
    assert_same(module, module(x), plain(module, x, x, dense, seen))


@pytest.mark.parametrize("nheads_kv", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_cross_attention_is_plain_attention(nheads_kv: int, causal: Any) -> None:
    """Keys and values come from the context, of another length; bottom_right lets the last query see the last key."""
    module = layer(nheads_kv=nheads_kv, causal=causal)
    x, context = normal(2, ROWS, EMBED, seed=5), normal(2, KEYS, EMBED, seed=6)
    seen = relative(ROWS, KEYS) <= KEYS - ROWS if causal else None
    assert_same(module, module(x, context), plain(module, x, context, torch.zeros(()), seen))


def test_masks_are_the_operators() -> None:
    """A bool mask says which keys take part, an additive one is added to the scores, both beside the bias."""
    module = layer(bias=AlibiBias(4))
    x = normal(2, ROWS, EMBED, seed=5)
    dense = flashbias.factors.alibi_slopes(4, dtype=torch.float64)[:, None, None] * relative()
    padding = torch.arange(ROWS) < torch.tensor([[ROWS], [6]])
    assert_same(module, module(x, mask=padding[:, None, None]), plain(module, x, x, dense, padding[:, None, None]))
    added = normal(4, ROWS, ROWS, seed=7)
    assert_same(module, module(x, mask=added), plain(module, x, x, dense + added))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_k_bias_may_have_a_head_for_each_group(heads: int) -> None:
    """Beside 4 query heads in 2 groups, k_bias has 1, 2 or 4 heads; head h of the queries reads that of its group."""
    q_bias, k_bias = normal(1, ROWS, 4, 3, seed=1), normal(2, KEYS, heads, 3, seed=2)
    module = layer(nheads_kv=2)
    x, context = normal(2, ROWS, EMBED, seed=5), normal(2, KEYS, EMBED, seed=6)
    dense = product(q_bias, k_bias.repeat_interleave(4 // heads, 2))
    assert_same(module, module(x, context, factors=(q_bias, k_bias)), plain(module, x, context, dense))


def test_fitted_networks_train_as_a_part_of_the_layer() -> None:
    """NeuralFactors at fixed places: its weights are the layer's parameters and get the dense bias's gradient."""
    places, places_k = normal(ROWS, 2, seed=3), normal(KEYS, 2, seed=4)
    networks = NeuralFactors(2, 4, 3, width=8)
    module = layer(bias=PositionBias(networks, places, places_k))
    assert sum(name.startswith("bias.builder.") for name, _ in module.named_parameters()) == 12
    x, context = normal(2, ROWS, EMBED, seed=5), normal(2, KEYS, EMBED, seed=6)
    dense = product(*networks(places, places_k))
    assert_same(module, module(x, context), plain(module, x, context, dense))


def test_one_set_of_places_serves_queries_and_keys() -> None:
    """PositionBias without coordinates_k is self-attention between its places, -||x - y||^2 for squared_distance."""
    places = normal(ROWS, 3, seed=3)
    module = layer(bias=PositionBias(squared_distance, places))
    x = normal(2, ROWS, EMBED, seed=5)
    assert_same(module, module(x), plain(module, x, x, -torch.cdist(places, places).square()))
    with pytest.raises(ArgumentError, match="q_bias: expected"):
        module(x[:, 1:])


def test_a_call_may_bring_its_own_factors() -> None:
    """``factors`` takes the place of the layer's bias, here with points of each batch, and gradients reach them."""
    module = layer(bias=AlibiBias(4))
    x, points = normal(2, ROWS, EMBED, seed=5), normal(2, ROWS, 3, seed=3).requires_grad_()
    out = module(x, factors=squared_distance(points, points))
    expected = plain(module, x, x, -(points[:, :, None] - points[:, None]).square().sum(-1)[:, None])
    assert_same(module, out, expected)
    got, wanted = (torch.autograd.grad(o.square().sum(), points)[0] for o in (out, expected))
    torch.testing.assert_close(got, wanted)


def decomposed(seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Returns factors of -|j - i| / 2, exact at full rank."""
    return from_dense(-relative(seqlen_q, seqlen_k).abs() / 2, rank=min(seqlen_q, seqlen_k))


@pytest.mark.parametrize(
    ("bias", "dense"),
    [
        (partial(alibi, 4, slopes=[1.0, 0.5, 0.25, 2.0], dtype=torch.float64), lambda h: h * relative()),
        (decomposed, lambda _: -relative().abs() / 2),
    ],
    ids=["builder", "function"],
)
def test_any_callable_is_a_bias(bias: Any, dense: Callable[[Tensor], Tensor]) -> None:
    """A builder with bound arguments and a function of the two lengths serve as they are."""
    module, x = layer(bias=bias), normal(2, ROWS, EMBED, seed=5)
    slopes = torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=torch.float64)[:, None, None]
    assert_same(module, module(x), plain(module, x, x, dense(slopes)))


def far(seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Returns fp32 factors whose differences between keys bf16 would lose: they are 1000 and a little."""
    return torch.ones(1, seqlen_q, 1, 1), 1000 + normal(1, seqlen_k, 4, 1, seed=1, dtype=torch.float32)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_sixteen_bits_do_not_touch_the_bias(way: str) -> None:
    """In autocast and with bf16 weights, fp32 factors keep their digits, and all parameters get gradients."""
    module = layer(bias=far, dtype=torch.float32)
    x = normal(2, ROWS, EMBED, seed=5, dtype=torch.float32)
    expected = plain(module, x, x, product(*far(ROWS, ROWS)).float())
    with settings(mode="read"):  # in Triton's interpreter kernels run, and nothing is to be tuned for this
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                out = module(x)
        else:
            out = module.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
    out.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


def test_alibi_keeps_its_positions_in_any_dtype() -> None:
    """Slopes become bf16 with the module; positions to 700 do not, and fp64 slopes make fp64 factors."""
    q_bias, k_bias = AlibiBias(4).to(torch.bfloat16)(1, 1400)
    assert q_bias.dtype == k_bias.dtype == torch.float32
    assert torch.equal(k_bias.flatten(), torch.arange(-700.0, 700.0))
    assert all(factor.dtype == torch.float64 for factor in AlibiBias(4).double()(2, 3))


def test_factors_of_fewer_bits_than_the_input_are_taken() -> None:
    """Beside fp32 inputs, bf16 factors are widened, and mixed ones meet in fp32."""
    module, x = layer(dtype=torch.float32), normal(1, ROWS, EMBED, seed=5, dtype=torch.float32)
    q_bias, k_bias = (normal(1, ROWS, 4, 3, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    expected = module(x, factors=(q_bias.float(), k_bias.float()))
    assert torch.equal(module(x, factors=(q_bias, k_bias)), expected)
    assert torch.equal(module(x, factors=(q_bias.double(), k_bias)), expected)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_state_dict_restores_the_layer(learnable: bool) -> None:
    """It holds projections and learned slopes, nothing that the constructor computes, and gives the same outputs."""
    source = layer(bias=AlibiBias(4, learnable=learnable), nheads_kv=2, causal=True)
    target = FlashBiasAttention(EMBED, 4, bias=AlibiBias(4, learnable=learnable), nheads_kv=2, causal=True).double()
    if learnable:
        source.bias.slopes.data += normal(4)
    state, x = source.state_dict(), normal(2, ROWS, EMBED, seed=5)
    projections = {f"{name}.{part}" for name in ("query", "key", "value", "out") for part in ("weight", "bias")}
    assert set(state) == projections | ({"bias.slopes"} if learnable else set())
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(state)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("out_bias", [False, True])
def test_projections_add_a_vector_if_asked_to(qkv_bias: bool, out_bias: bool) -> None:
    """qkv_bias is for the three projections in, out_bias for the one out."""
    names = {name for name, _ in FlashBiasAttention(EMBED, 4, qkv_bias=qkv_bias, out_bias=out_bias).named_parameters()}
    assert [f"{name}.bias" in names for name in ("query", "key", "value", "out")] == [*[qkv_bias] * 3, out_bias]


def test_device_and_dtype_reach_every_projection() -> None:
    """A layer can be made without memory, in any dtype; factors follow its inputs' device; and it says what it is."""
    module = FlashBiasAttention(EMBED, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert AlibiBias(4, device="meta").slopes.is_meta
    module.bias = AlibiBias(4)
    assert module(torch.zeros(2, 5, EMBED, device="meta", dtype=torch.bfloat16)).shape == (2, 5, EMBED)
    assert "nheads=4, nheads_kv=4, headdim=6, causal=False, window_size=(-1, -1)" in repr(module)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((0, 4), {}, "embed_dim: expected an integer"),
        ((24, 4.0), {}, "nheads: expected an integer"),
        ((24, 5), {}, "embed_dim: expected a multiple of nheads = 5, got 24"),
        ((24, 4), {"nheads_kv": 3}, "nheads: expected a multiple of nheads_kv = 3, got 4"),
        ((24, 4), {"nheads_kv": 0}, "nheads_kv: expected an integer"),
        ((24, 4), {"headdim": -6}, "headdim: expected an integer"),
        ((24, 4), {"bias": True}, "bias: expected a callable .* got bool"),
    ],
)
def test_a_wrong_layer_is_refused(arguments: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    """The constructor names what is wrong; ``bias=True``, PyTorch's word for projections, is told apart."""
    with pytest.raises(ArgumentError, match=words):
        FlashBiasAttention(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({}, {"x": torch.zeros(5, EMBED)}, r"x: expected a tensor \(B, S, 24\), got shape \(5, 24\)"),
        ({}, {"x": [1.0]}, "x: expected a tensor .* got list"),
        ({}, {"context": torch.zeros(2, 5, 7)}, "context: expected a tensor"),
        ({}, {"context": torch.zeros(3, 5, EMBED)}, "batch"),
        ({}, {"factors": torch.zeros(2, 5, 5)}, r"factors: expected two tensors \(q_bias, k_bias\), got Tensor"),
        ({"bias": torch.zeros}, {}, "factors: expected two tensors"),
        ({"bias": AlibiBias(3)}, {}, "q_bias"),
        ({"causal": "left"}, {}, "causal"),
    ],
)
def test_a_wrong_call_is_refused(options: dict[str, Any], inputs: dict[str, Any], words: str) -> None:
    """What does not fit the layer, or what the operator refuses, is an ArgumentError at the call."""
    with pytest.raises(ArgumentError, match=words):
        layer(dtype=torch.float32, **options)(**({"x": torch.zeros(2, 5, EMBED)} | inputs))


def test_the_module_is_reached_by_attribute() -> None:
    """``flashbias.nn`` needs no import of its own."""
    assert flashbias.nn.FlashBiasAttention is FlashBiasAttention
    assert "nn" in dir(flashbias)
