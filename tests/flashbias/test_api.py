"""The operator's door: what is allowed runs, and what is not is refused with what, expected, got and a cure."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashbias import errors, validation
from flashbias.api import flash_bias_func
from flashbias.errors import ArgumentError, FlashBiasError, UnsupportedError
from tests.flashbias.cases import CALLS, Call, make, naive


def arguments(**changes: Any) -> dict[str, Any]:
    """Returns valid arguments (B 2, Sq 5, Sk 7, H 4, D 8, R 3, fp32), but for ``changes``."""
    valid = {
        "q": torch.zeros(2, 5, 4, 8),
        "k": torch.zeros(2, 7, 4, 8),
        "v": torch.zeros(2, 7, 4, 8),
        "q_bias": torch.zeros(2, 5, 4, 3),
        "k_bias": torch.zeros(2, 7, 4, 3),
    }
    return valid | changes


def call_api(call: Call) -> Tensor:
    """Returns the operator's result."""
    return flash_bias_func(*call.arguments)


class TestAllowed:
    """Everything the docstring promises runs."""

    @pytest.mark.parametrize("name", CALLS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_result_is_softmax(self, name: str, dtype: torch.dtype) -> None:
        """Masks, broadcast factors, causal, dead rows: the result is that of an independent softmax."""
        call = replace(CALLS[name], **{key: tensor.to(dtype) for key, tensor in CALLS[name].factors()})
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(call_api(call), naive(call)[0], rtol=tolerance, atol=tolerance)

    def test_signature_is_positional_compatible_with_upstream(self) -> None:
        """The eight arguments come in upstream's order, so its callers need not change."""
        names = ["q", "k", "v", "q_bias", "k_bias", "mask", "causal", "softmax_scale"]
        parameters = inspect.signature(flash_bias_func).parameters
        assert list(parameters)[:8] == names
        assert all(parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in names)
        assert [parameters[name].default for name in names[3:]] == [None, None, None, False, None]

    def test_everything_after_the_scale_is_keyword_only(self) -> None:
        """What upstream does not have is given by name, and left out changes nothing."""
        added = list(inspect.signature(flash_bias_func).parameters.values())[8:]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added)
        defaults = {parameter.name: parameter.default for parameter in added}
        assert defaults.pop("precision") is None
        assert defaults == {"window_size": (-1, -1), "return_lse": False, "deterministic": None, "dropout_p": 0.0}

    def test_default_scale_is_inverse_root_of_head_dim(self) -> None:
        """Without softmax_scale the scores are scaled by 1/sqrt(D)."""
        call = make(rank=0)
        expected = flash_bias_func(call.q, call.k, call.v, softmax_scale=1 / math.sqrt(8))
        assert torch.equal(flash_bias_func(call.q, call.k, call.v), expected)

    @pytest.mark.parametrize("scale", [0, 1, -0.5, 0.0])
    def test_any_finite_scale(self, scale: float) -> None:
        """Integers, zero and negative scales are scales too."""
        call = replace(make(), scale=scale)
        torch.testing.assert_close(call_api(call), naive(call)[0])

    def test_scale_may_be_as_large_as_the_arithmetic_holds(self) -> None:
        """fp64 inputs take a scale that fp32 could not hold; zero scores stay zero whatever multiplies them."""
        given = {name: t.double() for name, t in arguments().items()}
        assert not flash_bias_func(**given, softmax_scale=1e300).any()
        assert not flash_bias_func(**arguments(), softmax_scale=10**38).any()

    @pytest.mark.parametrize("scale", [np.float16(0.5), np.float32(0.5), np.float64(0.5), np.int64(2)], ids=repr)
    @pytest.mark.parametrize("causal", [np.True_, np.False_])
    def test_numpy_scalars_are_numbers_and_truth_values(self, scale: Any, causal: Any) -> None:
        """What comes out of a NumPy array needs no cast."""
        call = make(causal=bool(causal))
        expected = flash_bias_func(*call.arguments[:6], bool(causal), float(scale))
        assert torch.equal(flash_bias_func(*call.arguments[:6], causal, scale), expected)

    def test_no_dropout_is_allowed(self) -> None:
        """A dropout of 0 is none."""
        assert torch.equal(flash_bias_func(**arguments(), dropout_p=0), flash_bias_func(**arguments()))

    @pytest.mark.parametrize("shape", [(), (7,), (5, 1), (5, 7), (4, 1, 7), (1, 1, 5, 7), (2, 4, 5, 7), (2, 1, 1, 1)])
    def test_masks_broadcast_from_the_right(self, shape: tuple[int, ...]) -> None:
        """A mask of up to four dims is aligned right to (B, H, Sq, Sk)."""
        random = torch.Generator().manual_seed(0)
        mask = torch.randn(shape, generator=random) > 0
        given = {name: torch.randn(t.shape, generator=random) for name, t in arguments().items()}
        expected = flash_bias_func(**given, mask=mask.expand(2, 4, 5, 7).contiguous())
        assert torch.equal(flash_bias_func(**given, mask=mask), expected)

    @pytest.mark.parametrize("sizes", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
    def test_zero_sizes(self, sizes: tuple[int, int, int, int]) -> None:
        """No batch, heads, rows or keys: zeros of the right shape, and gradients of zero."""
        batch, heads, rows, keys = sizes
        q, k = torch.ones(batch, rows, heads, 8), torch.ones(batch, keys, heads, 8)
        q_bias, k_bias = torch.ones(1, rows, heads, 2), torch.ones(batch, keys, 1, 2)
        inputs = [tensor.requires_grad_() for tensor in (q, k, k.clone(), q_bias, k_bias)]
        out = flash_bias_func(*inputs, torch.ones(keys, dtype=torch.bool), True)
        assert out.shape == q.shape
        assert not out.any()
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert [g.shape for g in gradients] == [t.shape for t in inputs]
        assert not any(g.any() for g in gradients)

    def test_lse_is_returned_where_asked_for(self) -> None:
        """With return_lse the result is a pair, whose first is the result without."""
        call = make(mask="dead", dtype=torch.float32)
        out, lse = flash_bias_func(*call.arguments, return_lse=True)
        assert torch.equal(out, flash_bias_func(*call.arguments))
        assert lse.shape == (2, 3, 13)
        assert lse.dtype == torch.float32
        assert bool((lse[:, :, [0, 6]] == -math.inf).all())


zeros = torch.zeros
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "not a tensor": ({"q": [1.0]}, ["q", "a tensor (B, Sq, H, D)", "list"]),
    "three dims": ({"k": zeros(7, 4, 8)}, ["k", "4 dims (B, Sk, Hkv, D)", "(7, 4, 8)", "unsqueeze"]),
    "five dims": ({"q_bias": zeros(1, 2, 5, 4, 3)}, ["q_bias", "4 dims (B or 1, Sq, H or 1, R)", "(1, 2, 5, 4, 3)"]),
    "sparse": ({"v": zeros(2, 7, 4, 8).to_sparse()}, ["v", "dense", "sparse_coo"]),
    "integer q": ({"q": zeros(2, 5, 4, 8, dtype=torch.int32)}, ["q", "float16, bfloat16 or float32", "int32", "Cast"]),
    "complex q": ({"q": zeros(2, 5, 4, 8, dtype=torch.complex64)}, ["q", "float16, bfloat16 or float32", "complex64"]),
    "mixed dtypes": ({"k": zeros(2, 7, 4, 8).half()}, ["k", "float32 as q", "float16", "k.to(q.dtype)"]),
    "integer factor": ({"k_bias": zeros(2, 7, 4, 3).long()}, ["k_bias", "float32 as q", "int64", "k_bias.float()"]),
    "narrower factor": ({"q_bias": zeros(2, 5, 4, 3).half()}, ["q_bias", "float32 as q, float32 or", "float16"]),
    "the other 16-bit factor": (
        {name: tensor.half() for name, tensor in arguments().items()} | {"k_bias": zeros(2, 7, 4, 3).bfloat16()},
        ["k_bias", "float16 as q, float32 or float64", "bfloat16", "k_bias.float()"],
    ),
    "factors of two dtypes": (
        {"k_bias": zeros(2, 7, 4, 3).double()},
        ["k_bias", "float32 as q_bias", "float64", "Cast the narrower of the two"],
    ),
    "device": ({"v": zeros(2, 7, 4, 8, device="meta")}, ["v", "cpu as q", "meta", "v.to(q.device)"]),
    "factor device": ({"q_bias": zeros(2, 5, 4, 3, device="meta")}, ["q_bias", "cpu as q", "meta"]),
    "mask device": ({"mask": zeros(5, 7, device="meta")}, ["mask", "cpu as q", "meta"]),
    "batch of k": ({"k": zeros(3, 7, 4, 8)}, ["k", "batch (dim 0) 2 as in q", "3 in shape (3, 7, 4, 8)"]),
    "batch of v": ({"v": zeros(1, 7, 4, 8)}, ["v", "batch (dim 0) 2 as in q", "1 in shape"]),
    "heads of k": (
        {"k": zeros(2, 7, 3, 8)},
        ["k", "4 heads (dim 2) as in q, or a divisor", "3 in shape", "transpose(1, 2)"],
    ),
    "more heads of k": ({"k": zeros(2, 7, 8, 8)}, ["k", "4 heads (dim 2) as in q, or a divisor", "8 in shape"]),
    "no heads of k": ({"k": zeros(2, 7, 0, 8)}, ["k", "4 heads (dim 2) as in q, or a divisor", "0 in shape"]),
    "heads of v": ({"v": zeros(2, 7, 2, 8)}, ["v", "heads (dim 2) 4 as in k", "2 in shape"]),
    "heads of k_bias in a group": (
        {"q": zeros(2, 5, 8, 8), "q_bias": zeros(2, 5, 8, 3), "k_bias": zeros(2, 7, 2, 3)},
        ["k_bias", "heads 1 or (dim 2) 8 as in q", "2 in shape"],
    ),
    "heads of q_bias in a group": (
        {"q": zeros(2, 5, 8, 8), "q_bias": zeros(2, 5, 4, 3)},
        ["q_bias", "heads 1 or (dim 2) 8 as in q", "4 in shape"],
    ),
    "length of v": ({"v": zeros(2, 6, 4, 8)}, ["v", "length (dim 1) 7 as in k", "6 in shape"]),
    "head dim of k": ({"k": zeros(2, 7, 4, 9)}, ["k", "head dim (dim 3) 8 as in q", "9 in shape"]),
    "no head dim": (
        {name: zeros(2, size, 4, 0) for name, size in (("q", 5), ("k", 7), ("v", 7))},
        ["q", "from 1 to 256", "(2, 5, 4, 0)"],
    ),
    "no value dim": ({"v": zeros(2, 7, 4, 0)}, ["v", "from 1 to 256", "(2, 7, 4, 0)"]),
    "q_bias alone": ({"k_bias": None}, ["both or none", "q_bias without k_bias"]),
    "k_bias alone": ({"q_bias": None}, ["both or none", "k_bias without q_bias"]),
    "length of q_bias": ({"q_bias": zeros(2, 1, 4, 3)}, ["q_bias", "length (dim 1) 5 as in q", "1 in shape"]),
    "length of k_bias": ({"k_bias": zeros(2, 5, 4, 3)}, ["k_bias", "length (dim 1) 7 as in k", "5 in shape"]),
    "batch of q_bias": ({"q_bias": zeros(3, 5, 4, 3)}, ["q_bias", "batch 1 or (dim 0) 2", "3 in shape"]),
    "heads of k_bias": ({"k_bias": zeros(2, 7, 2, 3)}, ["k_bias", "heads 1 or (dim 2) 4", "2 in shape"]),
    "rank of k_bias": ({"k_bias": zeros(2, 7, 4, 2)}, ["k_bias", "rank (dim 3) 3 as in q_bias", "2 in shape"]),
    "no rank": (
        {"q_bias": zeros(2, 5, 4, 0), "k_bias": zeros(2, 7, 4, 0)},
        ["q_bias", "a rank (dim 3) from 1 to 256", "0", "None"],
    ),
    "integer mask": ({"mask": zeros(5, 7, dtype=torch.int64)}, ["mask", "bool", "float", "int64", "mask.bool()"]),
    "mask of five dims": ({"mask": zeros(1, 1, 1, 5, 7)}, ["mask", "(2, 4, 5, 7)", "(1, 1, 1, 5, 7)"]),
    "padding mask": ({"mask": zeros(2, 7).bool()}, ["mask", "aligned right", "(2, 7)", "mask[:, None, None, :]"]),
    "mask too long": ({"mask": zeros(5, 8)}, ["mask", "(2, 4, 5, 7)", "(5, 8)"]),
    "mask not a tensor": ({"mask": [[True]]}, ["mask", "a tensor broadcastable to (2, 4, 5, 7)", "list"]),
    "causal by a wrong name": (
        {"causal": "top_left"},
        ["causal", 'True, False or "bottom_right"', "'top_left' (str)"],
    ),
    "causal misspelt": ({"causal": "bottom-right"}, ["causal", '"bottom_right"', "'bottom-right' (str)"]),
    "causal by number": ({"causal": 1}, ["causal", "True, False or", "1 (int)"]),
    "causal by nothing": ({"causal": None}, ["causal", "True, False or", "NoneType"]),
    "window by one number": ({"window_size": 4}, ["window_size", "(left, right)", "4 (int)"]),
    "window by nothing": ({"window_size": None}, ["window_size", "(left, right)", "NoneType", "(-1, -1)"]),
    "window of three": ({"window_size": (1, 2, 3)}, ["window_size", "(left, right)", "tuple", "(1023, 0)"]),
    "window of fractions": ({"window_size": (1.0, 0)}, ["window_size", "a number of keys or -1", "tuple"]),
    "window of truth values": ({"window_size": (True, False)}, ["window_size", "a number of keys or -1", "tuple"]),
    "window below -1": ({"window_size": (3, -2)}, ["window_size", "a number of keys or -1", "tuple"]),
    "window by name": ({"window_size": "ab"}, ["window_size", "(left, right)", "'ab' (str)"]),
    "deterministic by number": ({"deterministic": 1}, ["deterministic", "True, False or None", "1 (int)"]),
    "deterministic by name": ({"deterministic": "warn"}, ["deterministic", "True, False or None", "'warn' (str)"]),
    "scale as text": ({"softmax_scale": "0.5"}, ["softmax_scale", "a finite number or None", "'0.5' (str)"]),
    "scale as tensor": ({"softmax_scale": torch.ones(())}, ["softmax_scale", "a finite number or None", "Tensor"]),
    "scale as bool": ({"softmax_scale": True}, ["softmax_scale", "a finite number or None", "True (bool)"]),
    "numpy's truth as scale": ({"softmax_scale": np.True_}, ["softmax_scale", "a finite number or None", "bool"]),
    "numpy's NaN": ({"softmax_scale": np.float32("nan")}, ["softmax_scale", "a finite number or None", "nan"]),
    "numpy's number for causal": ({"causal": np.int64(1)}, ["causal", "True, False or", "int64"]),
    "scale beyond float": ({"softmax_scale": 10**400}, ["softmax_scale", "3.4e+38", "float32", "integer of 1329 bits"]),
    "scale beyond print": ({"softmax_scale": -(10**5000)}, ["softmax_scale", "3.4e+38", "integer of"]),
    "scale beyond fp32": ({"softmax_scale": 1e300}, ["softmax_scale", "3.4e+38", "float32", "1e+300 (float)"]),
    "scale beyond fp64": (
        {name: zeros(2, 5, 4, 8).double() for name in "qkv"}
        | {"q_bias": None, "k_bias": None, "softmax_scale": 10**400},
        ["softmax_scale", "1.8e+308", "float64"],
    ),
    "sparse mask": ({"mask": zeros(5, 7).to_sparse()}, ["mask", "dense", "sparse_coo"]),
    "infinite scale": ({"softmax_scale": math.inf}, ["softmax_scale", "a finite number or None", "inf"]),
}
UNSUPPORTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "wide head dim": (
        {name: zeros(2, size, 4, 257) for name, size in (("q", 5), ("k", 7), ("v", 7))},
        ["q", "a head dim (dim 3) of at most 256", "257"],
    ),
    "wide value dim": ({"v": zeros(2, 7, 4, 257)}, ["v", "a head dim (dim 3) of at most 256", "257"]),
    "high rank": (
        {"q_bias": zeros(2, 5, 4, 257), "k_bias": zeros(2, 7, 4, 257)},
        ["q_bias", "a rank of at most 256", "257", "additive mask"],
    ),
    "dropout": (
        {"dropout_p": 0.1},
        ["dropout_p", "0: attention dropout", "0.1 (float)", "scaled_dot_product_attention"],
    ),
    "dropout of everything": ({"dropout_p": 1}, ["dropout_p", "0: attention dropout", "1 (int)"]),
    "dropout by nothing": ({"dropout_p": None}, ["dropout_p", "0: attention dropout", "NoneType"]),
}


class TestRefused:
    """What cannot work is refused before anything runs, by one clear message."""

    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_argument(self, name: str) -> None:
        """A wrong argument is a ValueError that names it, what was expected, what came and what to do."""
        changes, parts = WRONG[name]
        with pytest.raises(ArgumentError) as caught:
            flash_bias_func(**arguments(**changes))
        assert isinstance(caught.value, ValueError)
        assert all(part in str(caught.value) for part in parts), str(caught.value)
        assert str(caught.value).startswith(parts[0]) or parts[0] == "both or none"

    @pytest.mark.parametrize("name", UNSUPPORTED)
    def test_unsupported_wish(self, name: str) -> None:
        """A sensible wish that is not fulfilled yet is a NotImplementedError with a way round."""
        changes, parts = UNSUPPORTED[name]
        with pytest.raises(UnsupportedError) as caught:
            flash_bias_func(**arguments(**changes))
        assert isinstance(caught.value, NotImplementedError)
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    @pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 42), (torch.float16, 64)], ids=str)
    @pytest.mark.parametrize("factor", [torch.float32, torch.float64], ids=str)
    def test_rank_of_split_factors(self, dtype: torch.dtype, limit: int, factor: torch.dtype) -> None:
        """Wider factors beside 16-bit inputs take several packed columns each, and the message says how to go on."""
        given = {name: tensor.to(dtype) for name, tensor in arguments().items()}
        given |= {name: zeros(1, size, 1, limit + 1, dtype=factor) for name, size in (("q_bias", 5), ("k_bias", 7))}
        beside = f"at most {limit} for {factor} factors beside {dtype}, got {limit + 1}".replace("torch.", "")
        with pytest.raises(
            UnsupportedError, match=rf"q_bias: expected a rank of {beside}\. Cast the factors to q's dtype"
        ):
            flash_bias_func(**given)
        given |= {name: given[name][..., :limit] for name in ("q_bias", "k_bias")}
        validation.check_factors(given["q"], given["k"], given["q_bias"], given["k_bias"])

    def test_fp64_on_a_gpu(self) -> None:
        """fp64 runs on a CPU only, and the message says so."""
        with FakeTensorMode():
            given = {name: torch.empty(t.shape, dtype=torch.float64, device="cuda") for name, t in arguments().items()}
            with pytest.raises(UnsupportedError, match=r"float32 on a GPU, got float64.*run on the CPU"):
                flash_bias_func(**given)

    def test_nested_tensors(self) -> None:
        """A nested tensor is refused with the advice to pad it."""
        nested = torch.nested.nested_tensor([zeros(5, 4, 8), zeros(3, 4, 8)], layout=torch.jagged)
        with pytest.raises(ArgumentError, match=r"q: expected a dense tensor .*nested.*Pad it"):
            flash_bias_func(**arguments(q=nested))

    def test_errors_have_one_base(self) -> None:
        """Everything raised on purpose can be caught as FlashBiasError."""
        kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
        assert {ArgumentError, UnsupportedError} < set(kinds)
        assert all(issubclass(kind, FlashBiasError) for kind in kinds)
