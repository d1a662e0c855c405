"""Foreign implementations: what is asked of them, and which rules keep them out."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.device import DeviceInfo, describe
from cache_db.models import Config, Environment, Scalar
from flashbias import reference
from flashbias.band import Band
from flashbias.band import band as band_of
from flashbias.implementations import rules, sdpa
from flashbias.implementations.foreign import Foreign
from flashbias.implementations.joining import Fold, join, led, pieces
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Environment(driver="", ptxas="", torch="")
H200 = DeviceInfo(0, "NVIDIA H200", "GPU-1", (9, 0), 132, 232448, "", "3.6.0", ENVIRONMENT)
B200 = replace(H200, name="NVIDIA B200", capability=(10, 0), sm_count=148)
SHAPE = Shape(batch=1, nheads=2, seqlen_q=128, seqlen_k=128, headdim=16, rank=3, dtype="bfloat16")
TRAINED = SHAPE.model_copy(update={"grads": ("q", "k", "v", "k_bias")})
OURS = Foreign(sdpa.ON_CPU, "")


def config(implementation: str, variant: str, **versions: Scalar) -> Config:
    """Returns a foreign config of these versions."""
    return Config(implementation=implementation, variant=variant, params=versions)


# What is asked of a backend


@pytest.mark.parametrize("scale", [0.25, 64**-0.5, 32**-0.5, 0.37, 3.7, 64.0, -0.2, 1e-3])
def test_a_scale_is_split_without_loss(scale: float) -> None:
    """Its power of two is exact in 16 bits and never enlarges q, and the rest is between 1 and 2 unless it was larger."""
    fold = Fold.of(scale)
    assert fold.factor * fold.scale == scale
    assert abs(fold.factor) <= 1
    assert float(torch.tensor(fold.factor, dtype=torch.float16)) == fold.factor
    assert 1 <= fold.scale < 2 or scale >= 2
    assert fold.parts == (1 if fold.scale == 1 else 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2.0**-20), (torch.bfloat16, 2.0**-16)])
def test_joined_columns_lose_almost_nothing(dtype: torch.dtype, bound: float) -> None:
    """Plain scores of the joined q and k are ours, to far less than the dtype's own rounding, at any scale."""
    generator = torch.Generator().manual_seed(0)
    q, k, q_bias, k_bias = (torch.randn(1, 9, 2, columns, generator=generator).to(dtype) for columns in (8, 8, 3, 3))
    for scale in (0.25, 8**-0.5, 0.37):
        fold = Fold.of(scale)
        joined = join(q, k, q_bias, k_bias, fold, 16)
        found = fold.scale * torch.einsum("bihc,bjhc->bhij", joined.q.double(), joined.k.double())
        right = scale * torch.einsum("bihc,bjhc->bhij", q.double(), k.double())
        right += torch.einsum("bihc,bjhc->bhij", q_bias.double(), k_bias.double())
        sizes = torch.einsum("bihc,bjhc->bhij", q_bias.double().abs(), k_bias.double().abs())
        assert ((found - right).abs() <= bound * sizes).all()


def test_pieces_are_the_band() -> None:
    """For any lengths and bound they see what the band lets see, once, and are square or aligned bottom-right."""
    for rows, keys, high, corner in itertools.product(range(1, 7), range(1, 7), range(-7, 8), (True, False)):
        seen = torch.zeros(rows, keys, dtype=torch.int64)
        for piece in pieces(Band(None, high), rows, keys, bottom_right=corner):
            lengths = led(torch.zeros(1, rows, 1, 1), piece).shape[1], len(range(keys)[piece.keys])
            assert lengths[0] == lengths[1] or not piece.causal or corner
            inner = torch.ones(lengths, dtype=torch.int64)
            inner = inner.tril(lengths[1] - lengths[0]) if piece.causal else inner
            seen[piece.rows, piece.keys] += inner[piece.lead :]
        assert torch.equal(seen, torch.ones(rows, keys, dtype=torch.int64).tril(high)), (rows, keys, high, corner)


def inputs(rows: int, keys: int, *, rank: int = 3, value_dim: int = 8) -> dict[str, Tensor | None]:
    """Returns fp64 numbers that bf16 holds, with factors that are shared."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.5).bfloat16()

    q_bias, k_bias = (normal(1, rows, 1, rank), normal(2, keys, 1, rank)) if rank else (None, None)
    found = {"q": normal(2, rows, 2, 8), "k": normal(2, keys, 2, 8), "v": normal(2, keys, 2, value_dim)}
    return {**found, "q_bias": q_bias, "k_bias": k_bias, "dout": normal(2, rows, 2, value_dim)}


@pytest.mark.parametrize("scale", [0.25, 0.37, -0.3, 0.0, 2.5])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("rows", "keys", "causal"),
    [(9, 9, False), (9, 9, True), (13, 7, "bottom_right"), (7, 13, True), (13, 7, True), (7, 12, "bottom_right")],
)
def test_forward_and_backward_agree_with_the_oracle(rows: int, keys: int, causal: Any, rank: int, scale: float) -> None:
    """O, LSE and all gradients, with one of LSE, are right for every band, rows without a key included."""
    tensors = inputs(rows, keys, rank=rank, value_dim=12)
    dout = tensors.pop("dout")
    call = list(tensors.values())
    seen = band_of(causal, (-1, -1), rows, keys)
    out, lse = OURS.forward(*call, seen, scale)
    right, right_lse = reference.forward(*call, None, seen, scale, compute_dtype=torch.float64)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close(out.double(), right, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-4)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(2)).masked_fill(lse == -torch.inf, 7.0)
    found = OURS.backward(dout, *call, out, lse, seen, scale, dlse)
    truth = reference.backward(
        dout, *call, None, seen, scale, right, right_lse, compute_dtype=torch.float64, dlse=dlse
    )._asdict()
    for name, value in found.items():
        expected = truth[name]
        summed = value.sum_to_size(expected.shape).double()
        torch.testing.assert_close(
            summed, expected, rtol=3e-2, atol=3e-2, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_only_calls_without_rows_of_zeros_are_said_to_suit() -> None:
    """A bound shifted to the right costs a backend that aligns top-left more scores than there are."""
    assert OURS.suits(Band(None, None), 9, 13)
    assert OURS.suits(Band(None, 0), 9, 13)
    assert not OURS.suits(Band(None, 4), 9, 13)
    assert Foreign(sdpa.EFFICIENT, "").suits(Band(None, 4), 9, 13)


# Rules


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask": "bool"}, "a mask"),
        ({"varlen": True}, "packed sequences"),
        ({"nheads_kv": 1}, "grouped queries"),
        ({"window": (8, 8)}, "a window"),
        ({"dtype": "float32"}, "fp32 arithmetic"),
        ({"factor_dtype": "float32"}, "more precision"),
        ({"layout": "strided"}, "16-byte"),
        ({"headdim": 256}, "takes at most"),
        ({"rank": 128}, "takes at most"),
    ],
)
def test_what_a_foreign_implementation_cannot_do_is_a_rule(changes: Mapping[str, Any], reason: str) -> None:
    """Each of these is refused by name, for every implementation there is on a GPU, without a run."""
    found = problem(Shape(**{**SHAPE.model_dump(), **changes}), H200)
    for implementation, variant in rules._ON_GPU:
        told = rules.rejects("forward", config(implementation, variant), found, H200)
        assert told is not None
        assert reason in told, (variant, told)


def test_a_backward_that_does_not_repeat_is_refused() -> None:
    """Of the backwards on a GPU those stay that add in one order: the efficient one, and flash-attn-4 on Blackwell."""
    for device, able in ((H200, {"efficient"}), (B200, {"efficient", "plain", "padded"})):
        found = problem(TRAINED, device)
        told = {name: rules.rejects("backward", config(*name), found, device) for name in rules._ON_GPU}
        refused = {variant for (_, variant), reason in told.items() if "bit for bit" in str(reason)}
        assert {variant for _, variant in rules._ON_GPU} - refused == able


def test_a_backward_that_would_lose_fp16s_range_is_refused() -> None:
    """Dq of fp16 inputs with factors comes out of a backend before its scale is undone; bf16 has room for that."""
    variant = rules.FLASH4, "plain"
    for dtype, refused in (("float16", True), ("bfloat16", False)):
        found = problem(SHAPE.model_copy(update={"dtype": dtype}), B200)
        assert ("fp16's range" in str(rules.rejects("backward", config(*variant), found, B200))) is refused
        assert "fp16's range" not in str(rules.rejects("forward", config(*variant), found, B200))


def test_backends_of_one_class_and_different_widths_are_different_code() -> None:
    """What sets a backend apart is part of its identity, and so of its proofs."""
    codes = {rules._code(type(each), tuple(sorted(vars(each).items()))) for each in rules._ON_GPU.values()}
    assert len(codes) == len(rules._ON_GPU)


def test_one_pass_of_the_backward_is_nobodys() -> None:
    """They compute the forward or the whole backward, and our kernels never the whole backward."""
    found, device = problem(TRAINED, describe(-1)), describe(-1)
    (foreign,) = rules.candidates("backward", device)
    assert "not backward_dq alone" in str(ATTENTION.rejects("backward_dq", foreign, found, device))
    assert rules.candidates("backward_dq", device) == []
    own = ATTENTION.default("forward", found, device)
    assert ATTENTION.rejects("backward", own, found, device) is not None
    assert ATTENTION.candidates("backward", found, device) == [foreign]


def test_another_version_is_refused_and_named() -> None:
    """A row of another torch, of other code of ours, or of what is not installed may not run."""
    found, device = problem(SHAPE, describe(-1)), describe(-1)
    (foreign,) = rules.candidates("forward", device)
    assert foreign.params["torch"] == str(torch.__version__)
    assert ATTENTION.rejects("forward", foreign, found, device) is None
    for name in foreign.params:
        other = foreign.model_copy(update={"params": {**foreign.params, name: "1.0"}})
        assert ATTENTION.rejects("forward", other, found, device) == f"it is of {name} 1.0, here {foreign.params[name]}"
        with pytest.raises(OSError, match=f"it is of {name} 1.0"):
            ATTENTION.compile("forward", other, found, device)
    assert "unknown implementation" in str(ATTENTION.rejects("forward", config("sdpa", "math"), found, device))
    told = str(rules.rejects("forward", config("flash4", "plain"), problem(SHAPE, H200), H200))
    assert "not installed" in told or "it is of" in told  # by what is installed


def test_nothing_foreign_is_imported_to_be_a_candidate(tmp_path: Path) -> None:
    """flash-attn-4 is listed, refused or allowed by what is installed; a package that breaks at import is not imported."""
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it was imported')\n", encoding="utf-8")
    for name in ("flash_attn_4-4.0.0", "nvidia_cutlass_dsl-4.4.0"):
        (tmp_path / f"{name}.dist-info").mkdir()
        title, _, version = name.replace("_", "-").rpartition("-")
        text = f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n"
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(text, encoding="utf-8")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.flashbias.test_implementations import H200, SHAPE\n"
        "from flashbias.kernels.problem import problem\n"
        "from flashbias.kernels.spec import ATTENTION\n"
        "found = problem(SHAPE, H200)\n"
        "listed = [each for each in ATTENTION.candidates('forward', found, H200) if each.implementation == 'flash4']\n"
        "assert [each.variant for each in listed] == ['plain', 'padded'], listed\n"
        "assert listed[0].params['flash-attn-4'] == '4.0.0' and listed[0].params['nvidia-cutlass-dsl'] == '4.4.0'\n"
        "for each in listed:\n"
        "    assert ATTENTION.rejects('forward', each, found, H200) is None\n"
        "    assert len(ATTENTION.compile('forward', each, found, H200).load().binary) == 64\n"
        "assert not [name for name in sys.modules if name.startswith('flash_attn')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
