"""The reference against an independent, unchunked softmax and autograd, and its chunking, rounding and memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashbias import chunks, reference
from tests.flashbias.cases import CALLS, NAMES, Call, alibi, differentiate, gradient_like, make, naive, relative_error


@pytest.fixture(params=[16 << 20, 1200, 8], ids=["one chunk", "some chunks", "a chunk per row"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Limits the bytes of a chunk of scores."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", request.param)
    return request.param


def close(actual: Tensor | None, expected: Tensor) -> None:
    """Asserts equality to fp64 rounding, shape and dtype included."""
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def oracle(call: Call) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) in fp64."""
    return reference.forward(*call.arguments, compute_dtype=torch.float64)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
class TestOracle:
    """In fp64 every result is that of an independent softmax, however the work is cut."""

    def test_forward_is_softmax(self, call: Call) -> None:
        """O and LSE are those of a softmax over the whole score tensor."""
        out, lse = oracle(call)
        expected_out, expected_lse = naive(call)
        close(out, expected_out)
        close(lse, expected_lse)

    @pytest.mark.parametrize("given", [True, False], ids=["delta from O", "delta from P"])
    def test_backward_is_autograd(self, call: Call, given: bool) -> None:
        """Each gradient is autograd's, in its input's own shape."""
        out, lse = oracle(call)
        dout = gradient_like(out)
        gradients = reference.backward(
            dout, *call.arguments, out if given else None, lse, compute_dtype=torch.float64, recentre=given
        )
        expected = differentiate(call, dout)
        for name in NAMES:
            actual = getattr(gradients, f"d{name}")
            assert (actual is None) == (name not in expected)
            if name in expected:
                close(actual, expected[name])

    def test_magnitudes_are_sums_of_absolute_values(self, call: Call) -> None:
        """Magnitudes are the gradients' own sums with every term made positive, and none is below its gradient."""
        out, lse = oracle(call)
        dout = gradient_like(out)
        found = reference.magnitudes(dout, *call.arguments, out, lse, compute_dtype=torch.float64)
        expected = absolute_sums(call, dout, out, lse)
        gradients = differentiate(call, dout)
        close(found.out, expected["out"])
        assert bool((found.out >= out.abs() - 1e-12).all())
        for name, gradient in gradients.items():
            actual = getattr(found, f"d{name}")
            close(actual, expected[name])
            assert bool((actual >= gradient.abs() - 1e-12).all())


def absolute_sums(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """Returns the magnitudes by einsum over the whole score tensor."""
    ones = torch.eye(call.k.shape[1], dtype=call.k.dtype)[None, :, None].expand(
        call.k.shape[0], -1, call.k.shape[2], -1
    )
    weights = naive(replace(call, v=ones))[0].transpose(1, 2)
    noise = (dout * out).abs().sum(-1).transpose(1, 2)[..., None]
    bound = weights * (torch.einsum("bihd,bjhd->bhij", dout, call.v).abs() + noise)
    sums = {
        "out": torch.einsum("bhij,bjhd->bihd", weights, call.v.abs()),
        "q": torch.einsum("bhij,bjhd->bihd", bound, call.k.abs()) * abs(call.scale),
        "k": torch.einsum("bhij,bihd->bjhd", bound, call.q.abs()) * abs(call.scale),
        "v": torch.einsum("bhij,bihd->bjhd", weights, dout.abs()),
    }
    if call.q_bias is not None and call.k_bias is not None:
        batch, heads = bound.shape[:2]
        q_bias, k_bias = (t.abs().expand(batch, -1, heads, -1) for t in (call.q_bias, call.k_bias))
        sums["q_bias"] = torch.einsum("bhij,bjhr->bihr", bound, k_bias).sum_to_size(call.q_bias.shape)
        sums["k_bias"] = torch.einsum("bhij,bihr->bjhr", bound, q_bias).sum_to_size(call.k_bias.shape)
    return sums


class TestEdges:
    """Nothing that is allowed breaks: no rows, no keys, no gradient wanted, any strides."""

    @pytest.mark.parametrize("sizes", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
    def test_zero_sizes_give_zeros(self, sizes: tuple[int, int, int, int]) -> None:
        """Without batch, heads, rows or keys: O is 0, LSE -inf and gradients are 0, in the right shapes."""
        batch, heads, rows, keys = sizes
        call = make(batch, heads, rows, keys, causal=True)
        out, lse = oracle(call)
        gradients = reference.backward(out, *call.arguments, out, lse, compute_dtype=torch.float64)
        assert out.shape == (batch, rows, heads, 5)
        assert not out.any()
        assert bool((lse == -math.inf).all())
        for name, tensor in call.factors():
            gradient = getattr(gradients, f"d{name}")
            assert gradient.shape == tensor.shape
            assert not gradient.any()

    def test_single_key_has_a_magnitude(self) -> None:
        """Where softmax has one key only, dq is 0 but its magnitude is not: delta carries the rounding of O."""
        call = make(keys=1)
        out, lse = oracle(call)
        dout = gradient_like(out)
        gradient = reference.backward(dout, *call.arguments, out, lse, compute_dtype=torch.float64).dq
        magnitude = reference.magnitudes(dout, *call.arguments, out, lse, compute_dtype=torch.float64).dq
        assert gradient is not None
        assert magnitude is not None
        assert float(gradient.abs().max()) < 1e-14
        assert float(magnitude.min()) > 1e-6

    @pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
    def test_only_wanted_gradients(self, wanted: reference.Wanted) -> None:
        """Any subset can be asked for: it is bitwise that of the full set, and the rest is None."""
        call = make(broadcast=(1, 3, 2, 1), mask="dead", causal=True)
        out, lse = oracle(call)
        dout = gradient_like(out)
        full = reference.backward(dout, *call.arguments, out, lse, compute_dtype=torch.float64)
        some = reference.backward(dout, *call.arguments, out, lse, compute_dtype=torch.float64, wanted=wanted)
        for want, ours, theirs in zip(wanted, some, full, strict=True):
            assert torch.equal(ours, theirs) if want else ours is None

    def test_strides_do_not_matter(self) -> None:
        """Transposed, sliced and expanded inputs give what their contiguous copies give."""
        call = make(mask="bool")
        strange = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in call.factors()}
        strange["q"] = torch.cat([call.q, call.q], -1)[..., : call.q.shape[3]]
        strange["k"] = call.k[:, :1].expand(call.k.shape)
        plain = {name: tensor.contiguous() for name, tensor in strange.items()}
        close(oracle(replace(call, **strange))[0], oracle(replace(call, **plain))[0])

    def test_chunks_cover_every_score_once(self) -> None:
        """However many heads and batches, chunks tile the scores and a batched product stays within the grid."""
        q = torch.zeros(1).expand(5, 2, 40_000, 1)
        call = chunks.Call(q, q, q, None, None, None, False, 1.0, torch.float32)
        seen = torch.zeros(5, 40_000, 2, dtype=torch.int8)
        for chunk in call.chunks():
            part = seen[chunk.batch, chunk.heads, chunk.rows]
            assert part.shape[0] * part.shape[1] <= 65_535
            part += 1
        assert bool((seen == 1).all())


class TestArithmetic:
    """The ideal kernel rounds where a 16-bit kernel must, and nowhere else."""

    def ideal(self, call: Call, dout: Tensor, **options: Any) -> tuple[Tensor, Tensor, reference.Gradients]:
        """Returns (out, lse, gradients) of the ideal kernel for q's dtype."""
        options |= {"compute_dtype": torch.float32, "round_to": call.q.dtype}
        out, lse = reference.forward(
            *call.arguments, compute_dtype=options["compute_dtype"], round_to=options["round_to"]
        )
        return out, lse, reference.backward(dout, *call.arguments, out, lse, **options)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_ideal_error_is_a_unit_roundoff(self, dtype: torch.dtype) -> None:
        """O and gradients of the ideal are off by about the dtype's roundoff: not exact, and not much worse."""
        call = make(rows=67, keys=71, mask="bool", causal=True, dtype=dtype)
        exact = replace(call, **{name: tensor.double() for name, tensor in call.factors()})
        dout = gradient_like(oracle(call)[0]).to(dtype)
        out, lse, gradients = self.ideal(call, dout)
        roundoff = torch.finfo(dtype).eps / 2
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert roundoff / 4 < relative_error(out, naive(exact)[0]) < 2 * roundoff
        for name, expected in differentiate(exact, dout.double()).items():
            actual = getattr(gradients, f"d{name}")
            assert actual.dtype == dtype
            assert roundoff / 4 < relative_error(actual, expected) < 4 * roundoff

    def test_bias_is_never_rounded(self) -> None:
        """With fp32 factors beside bf16 inputs, LSE is exact to fp32 although the bias needs 20 bits."""
        call = make(rows=5, keys=7, rank=1, dtype=torch.bfloat16)
        position = torch.arange(7, dtype=torch.float32).view(1, 7, 1, 1) + 2.0**12
        call = replace(call, q_bias=torch.full((1, 5, 1, 1), 1.0 + 2.0**-8), k_bias=position)
        _, lse = reference.forward(*call.arguments, compute_dtype=torch.float32, round_to=torch.bfloat16)
        expected = oracle(call)[1]
        assert float((lse - expected).abs().max()) <= 2 * 2.0**-23 * float(expected.abs().max())

    def test_gradients_of_fp32_factors_are_not_rounded(self) -> None:
        """The ideal's gradients have their own input's dtype: fp32 for fp32 factors beside 16-bit inputs."""
        call = alibi(64)
        *_, gradients = self.ideal(call, gradient_like(call.v))
        assert [g.dtype for g in gradients if g is not None] == [torch.bfloat16] * 3 + [torch.float32] * 2

    def test_recentred_factors_keep_alibi_gradients(self) -> None:
        """dq_bias of ALiBi is lost in the rounding of dS unless k_bias is measured from its mean in the row."""
        call = alibi()
        dout = gradient_like(call.v)
        exact = replace(call, **{name: tensor.double() for name, tensor in call.factors()})
        expected = differentiate(exact, dout.double())["q_bias"][..., 0]

        def error(recentre: bool) -> float:
            gradient = self.ideal(call, dout, recentre=recentre)[2].dq_bias
            assert gradient is not None
            return relative_error(gradient[..., 0], expected)

        assert error(recentre=True) < 1e-2
        assert error(recentre=False) > 10 * error(recentre=True)

    def test_autocast_changes_nothing(self) -> None:
        """A caller's autocast does not lower the precision of the reference."""
        call = make(dtype=torch.float32)
        expected = reference.forward(*call.arguments, compute_dtype=torch.float32)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(reference.forward(*call.arguments, compute_dtype=torch.float32)[0], expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def everything(call: Call) -> None:
    """Runs all three passes in fp64."""
    out, lse = oracle(call)
    reference.backward(out, *call.arguments, out, lse, compute_dtype=torch.float64, recentre=True)
    reference.magnitudes(out, *call.arguments, out, lse, compute_dtype=torch.float64)


class TestCost:
    """The reference is usable at real sizes: bounded memory and no look at values from the host."""

    @pytest.mark.parametrize("mask", ["none", "keys", "expanded"])
    def test_no_tensor_exceeds_a_chunk(self, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """No intermediate is larger than a chunk, although the scores of one head are twice that."""
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 128 << 10)
        call = make(batch=2, heads=2, rows=180, keys=190, broadcast=(1, 2, 2, 1), mask=mask, causal=True)
        with LargestTensor() as largest:
            everything(call)
        assert 64 << 10 < largest.bytes <= 128 << 10

    def test_nothing_depends_on_values(self) -> None:
        """All passes run on tensors without values, so a GPU is never waited for."""
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(tensor) for name, tensor in CALLS["dead rows"].factors()}
            mask = mode.from_tensor(torch.ones(2, 1, 13, 17, dtype=torch.bool))
            everything(replace(CALLS["dead rows"], **fake, mask=mask))
