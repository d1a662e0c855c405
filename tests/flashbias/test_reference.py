"""The reference against an independent, unchunked softmax and autograd, and its rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbias import chunks, reference
from tests.flashbias.cases import (
    CALLS,
    NAMES,
    WIDER_CALLS,
    Call,
    alibi,
    all_scores,
    differentiate,
    gradient_like,
    make,
    naive,
    per_head,
    relative_error,
    visible,
)

ALL_CALLS = CALLS | WIDER_CALLS


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
    return reference.forward(*call.banded, compute_dtype=torch.float64)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("call", ALL_CALLS.values(), ids=ALL_CALLS.keys())
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
        """Each gradient is autograd's through O and LSE, in its input's own shape."""
        out, lse = oracle(call)
        dout, dlse = gradient_like(out), gradient_like(lse, seed=2)
        for upstream in (None, dlse):
            gradients = reference.backward(
                dout,
                *call.banded,
                out if given else None,
                lse,
                compute_dtype=torch.float64,
                recentre=given,
                dlse=upstream,
            )
            expected = differentiate(call, dout, upstream)
            for name in (*NAMES, "mask"):
                actual = getattr(gradients, f"d{name}")
                assert (actual is None) == (name not in expected)
                if name in expected:
                    close(actual, expected[name])

    def test_magnitudes_are_sums_of_absolute_values(self, call: Call) -> None:
        """Magnitudes are the gradients' own sums with every term made positive, and none is below its gradient."""
        out, lse = oracle(call)
        dout, dlse = gradient_like(out), gradient_like(lse, seed=2)
        found = reference.magnitudes(dout, *call.banded, out, lse, compute_dtype=torch.float64, dlse=dlse)
        expected = absolute_sums(call, dout, dlse, out)
        gradients = differentiate(call, dout, dlse)
        close(found.out, expected["out"])
        assert bool((found.out >= out.abs() - 1e-12).all())
        for name, gradient in gradients.items():
            actual = getattr(found, f"d{name}")
            close(actual, expected[name])
            assert bool((actual >= gradient.abs() - 1e-12).all())


def absolute_sums(call: Call, dout: Tensor, dlse: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Returns the magnitudes: autograd of sums over the whole score tensor, linear in each input's absolute values."""
    keys = call.k.shape[1]
    ones = torch.eye(keys, dtype=call.k.dtype)[None, :, None].expand(call.k.shape[0], -1, call.k.shape[2], -1)
    weights = naive(replace(call, v=ones))[0].transpose(1, 2)
    noise = (dout * out).abs().sum(-1).transpose(1, 2)[..., None] + dlse.abs()[..., None]
    bound = weights * (torch.einsum("bihd,bjhd->bhij", dout, per_head(call.v, call.q)).abs() + noise)
    leaves = {name: tensor.abs().requires_grad_() for name, tensor in call.factors()}
    additive = call.additive()
    if additive is not None:
        leaves["mask"] = torch.zeros(additive.shape, dtype=torch.float64, requires_grad=True)
    absolute = replace(call, **leaves, scale=abs(call.scale))
    total = torch.einsum("bhij,bjhd->bihd", weights, per_head(absolute.v, call.q))
    upstream = (bound * all_scores(absolute)).sum() + (total * dout.abs()).sum()
    sums = torch.autograd.grad(upstream, list(leaves.values()))
    return {"out": total.detach(), **dict(zip(leaves, sums, strict=True))}


class TestEdges:
    """Nothing that is allowed breaks: no rows, no keys, no gradient wanted, any strides."""

    @pytest.mark.parametrize("sizes", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
    def test_zero_sizes_give_zeros(self, sizes: tuple[int, int, int, int]) -> None:
        """Without batch, heads, rows or keys: O is 0, LSE -inf and gradients are 0, in the right shapes."""
        batch, heads, rows, keys = sizes
        call = replace(make(batch, heads, rows, keys, causal=True, mask="additive"), window=(2, 0))
        out, lse = oracle(call)
        gradients = reference.backward(out, *call.banded, out, lse, compute_dtype=torch.float64)
        assert out.shape == (batch, rows, heads, 5)
        assert not out.any()
        assert bool((lse == -math.inf).all())
        for name, tensor in (*call.factors(), ("mask", call.mask)):
            gradient = getattr(gradients, f"d{name}")
            assert gradient.shape == tensor.shape
            assert not gradient.any()

    def test_single_key_has_a_magnitude(self) -> None:
        """Where softmax has one key only, dq is 0 but its magnitude is not: delta carries the rounding of O."""
        call = make(keys=1)
        out, lse = oracle(call)
        dout = gradient_like(out)
        gradient = reference.backward(dout, *call.banded, out, lse, compute_dtype=torch.float64).dq
        magnitude = reference.magnitudes(dout, *call.banded, out, lse, compute_dtype=torch.float64).dq
        assert gradient is not None
        assert magnitude is not None
        assert float(gradient.abs().max()) < 1e-14
        assert float(magnitude.min()) > 1e-6

    @pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=6)), ids=str)
    def test_only_wanted_gradients(self, wanted: reference.Wanted) -> None:
        """Any subset of gradients and magnitudes can be asked for: it is that of the full set, and the rest is None."""
        call = make(broadcast=(1, 3, 2, 1), mask="additive dead", causal=True)
        out, lse = oracle(call)
        arguments = (gradient_like(out), *call.banded, out, lse)
        for function, skipped in ((reference.backward, 0), (reference.magnitudes, 1)):
            full = function(*arguments, compute_dtype=torch.float64)[skipped:]
            some = function(*arguments, compute_dtype=torch.float64, wanted=wanted)[skipped:]
            for want, ours, theirs in zip(wanted, some, full, strict=True):
                assert torch.equal(ours, theirs) if want else ours is None

    def test_bool_masks_have_no_gradient(self) -> None:
        """A bool mask is given none, asked for or not."""
        call = make(mask="bool")
        out, lse = oracle(call)
        assert reference.backward(out, *call.banded, out, lse, compute_dtype=torch.float64).dmask is None
        assert reference.magnitudes(out, *call.banded, out, lse, compute_dtype=torch.float64).dmask is None

    @pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
    def test_what_is_excluded_gives_the_mask_exactly_nothing(self, window: tuple[int, int]) -> None:
        """Dmask is 0, not merely small, where the band or -inf excludes, and nowhere else."""
        call = make(mask="additive dead", causal=True, rank=0, window=window)
        assert call.mask is not None
        out, lse = oracle(call)
        gradient = reference.backward(gradient_like(out), *call.banded, out, lse, compute_dtype=torch.float64).dmask
        assert gradient is not None
        seen = visible(call) & (call.mask > -math.inf)
        seen[seen.sum(-1) == 1] = False  # a single key takes part with P = 1 and a gradient that cancels
        assert not gradient[~visible(call) | (call.mask == -math.inf)].any()
        assert bool((gradient[seen] != 0).all())

    @pytest.mark.parametrize("upstream", [math.inf, math.nan])
    def test_dead_rows_take_no_gradient_from_lse(self, upstream: float) -> None:
        """Whatever arrives for the LSE of a row without keys (-inf squared gives inf), every gradient stays as it was."""
        call = replace(make(rows=19, keys=7, mask="additive"), causal="bottom_right")
        out, lse = oracle(call)
        dlse = gradient_like(lse, seed=2)
        poisoned = dlse.masked_fill(lse == -math.inf, upstream)
        assert bool((~poisoned.isfinite()).any())
        arguments = (gradient_like(out), *call.banded, out, lse)
        for function in (reference.backward, reference.magnitudes):
            clean = function(*arguments, compute_dtype=torch.float64, dlse=dlse)
            for ours, theirs in zip(
                function(*arguments, compute_dtype=torch.float64, dlse=poisoned), clean, strict=True
            ):
                assert torch.equal(ours, theirs)

    def test_strides_do_not_matter(self) -> None:
        """Transposed, sliced and expanded inputs give what their contiguous copies give."""
        call = make(mask="bool")
        strange = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in call.factors()}
        strange["q"] = torch.cat([call.q, call.q], -1)[..., : call.q.shape[3]]
        strange["k"] = call.k[:, :1].expand(call.k.shape)
        plain = {name: tensor.contiguous() for name, tensor in strange.items()}
        close(oracle(replace(call, **strange))[0], oracle(replace(call, **plain))[0])


class TestArithmetic:
    """The ideal kernel rounds where a 16-bit kernel must, and nowhere else."""

    def ideal(self, call: Call, dout: Tensor, **options: Any) -> tuple[Tensor, Tensor, reference.Gradients]:
        """Returns (out, lse, gradients) of the ideal kernel for q's dtype."""
        options |= {"compute_dtype": torch.float32, "round_to": call.q.dtype}
        out, lse = reference.forward(*call.banded, compute_dtype=options["compute_dtype"], round_to=options["round_to"])
        return out, lse, reference.backward(dout, *call.banded, out, lse, **options)

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
        _, lse = reference.forward(*call.banded, compute_dtype=torch.float32, round_to=torch.bfloat16)
        expected = oracle(call)[1]
        assert float((lse - expected).abs().max()) <= 2 * 2.0**-23 * float(expected.abs().max())

    def test_gradients_of_fp32_factors_are_not_rounded(self) -> None:
        """The ideal's gradients have their own input's dtype: fp32 for fp32 factors beside 16-bit inputs."""
        call = alibi(64)
        *_, gradients = self.ideal(call, gradient_like(call.v))
        assert [g.dtype for g in gradients if g is not None] == [torch.bfloat16] * 3 + [torch.float32] * 2

    @pytest.mark.parametrize("through_lse", [False, True], ids=["O", "O and LSE"])
    def test_recentred_factors_keep_alibi_gradients(self, through_lse: bool) -> None:
        """dq_bias of ALiBi is lost in the rounding of dS unless k_bias is measured from its mean in the row.

        LSE's part of it, dLSE times that mean, is exact, so the error is measured against O's part alone.
        """
        call = alibi()
        dout = gradient_like(call.v)
        dlse = gradient_like(oracle(call)[1], seed=2) if through_lse else None
        exact = replace(call, **{name: tensor.double() for name, tensor in call.factors()})
        expected = differentiate(exact, dout.double(), dlse)["q_bias"][..., 0]
        own = differentiate(exact, dout.double())["q_bias"][..., 0]

        def error(recentre: bool) -> float:
            gradient = self.ideal(call, dout, recentre=recentre, dlse=dlse)[2].dq_bias
            assert gradient is not None
            return float((gradient[..., 0] - expected).norm() / own.norm())

        assert error(recentre=True) < 1e-2
        assert error(recentre=False) > 10 * error(recentre=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_the_gradient_of_a_mask_is_rounded_once(self, dtype: torch.dtype) -> None:
        """No product makes dmask: dS is not rounded on its way to it, so only the mask's own dtype limits it."""
        narrow = make(dtype=dtype, mask="additive")
        dout = gradient_like(narrow.v[:, :1].expand(-1, 13, -1, -1))
        for mask_dtype, tolerance in ((torch.float32, 1e-6), (dtype, torch.finfo(dtype).eps / 2)):
            assert narrow.mask is not None
            call = replace(narrow, mask=narrow.mask.to(mask_dtype))
            exact = replace(call, **{name: tensor.double() for name, tensor in call.factors()})
            # out=None: the ideal's own O is rounded, and delta would carry that.
            gradients = reference.backward(
                dout, *call.banded, None, oracle(call)[1], compute_dtype=torch.float32, round_to=dtype
            )
            assert gradients.dmask is not None
            assert gradients.dmask.dtype == mask_dtype
            assert relative_error(gradients.dmask, differentiate(exact, dout.double())["mask"]) < tolerance

    def test_autocast_changes_nothing(self) -> None:
        """A caller's autocast does not lower the precision of the reference."""
        call = make(dtype=torch.float32)
        expected = reference.forward(*call.banded, compute_dtype=torch.float32)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(reference.forward(*call.banded, compute_dtype=torch.float32)[0], expected)
