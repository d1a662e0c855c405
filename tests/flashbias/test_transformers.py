"""Models of the real transformers library with tiny random weights: the same logits, gradients and tokens as without us."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashbias
from flashbias.errors import ArgumentError, UnsupportedError

pytest.importorskip("transformers", minversion="5.0", reason="transformers 5.0 or newer is not installed")

from flashbias.integrations.transformers import attach, detach

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers.*", "ignore::Warning:huggingface_hub.*")
LAYERS, HEADS = 2, 6


def bloom(**changes: Any) -> nn.Module:
    """Returns a tiny BLOOM with random weights."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0}
    config = BloomConfig(**{**sizes, "attention_dropout": 0.0, "initializer_range": 0.3, **changes})
    return BloomForCausalLM(config).eval()


def mpt(**changes: Any) -> nn.Module:
    """Returns a tiny MPT with random weights."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 48, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64}
    return MptForCausalLM(MptConfig(**{**sizes, "initializer_range": 0.3, **changes})).eval()


Maker = Callable[..., nn.Module]
both = pytest.mark.parametrize("make", [bloom, mpt])


def pair(make: Maker, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Returns a model as it comes, and the same one attached."""
    plain = make().to(dtype)
    ours = copy.deepcopy(plain)
    assert attach(ours) == LAYERS
    return plain, ours


def tokens(batch: int = 2, length: int = 19) -> Tensor:
    """Returns token ids."""
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    """Returns the mask of a batch whose second text is five tokens shorter."""
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(14, None)] = 0
    return mask


def off(found: Tensor, wanted: Tensor) -> float:
    """Returns the relative error of a whole tensor."""
    return float((found - wanted).norm() / wanted.norm())


@both
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_logits_are_those_of_the_original(make: Maker, pad: str) -> None:
    """With and without padding, on either side, every token that is no padding has the same logits."""
    plain, ours = pair(make)
    given = {} if pad == "none" else {"attention_mask": padding(pad)}
    real = given.get("attention_mask", torch.ones(2, 19)).bool()
    with torch.no_grad():
        wanted, found = (model(tokens(), **given).logits[real] for model in (plain, ours))
    assert off(found, wanted) < 1e-5


@both
def test_half_precision_is_as_near_the_truth_as_the_original(make: Maker) -> None:
    """In bf16 the logits are at most as far from those in fp64 as the original's, but for chance."""
    plain, ours = pair(make, torch.bfloat16)
    with torch.no_grad(), flashbias.settings(mode="off"):
        truth = copy.deepcopy(plain).double()(tokens()).logits
        wanted, found = (model(tokens()).logits.double() for model in (plain, ours))
    assert off(found, truth) < 1.5 * off(wanted, truth)


@both
def test_gradients_are_those_of_the_original(make: Maker) -> None:
    """Every weight gets the same gradient, padding or not."""
    grads = []
    for model in pair(make):
        out = model(tokens(), attention_mask=padding("right"), labels=tokens().masked_fill(padding("right") == 0, -100))
        out.loss.backward()
        grads.append({name: each.grad for name, each in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        assert off(grads[1][name], wanted) < 1e-4, name


@both
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_finds_the_same_tokens(make: Maker, cache: str) -> None:
    """Greedy decoding with a cache, of a batch with padding on the left, gives the same text."""
    plain, ours = pair(make)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": None if cache == "dynamic" else cache}
    wanted, found = (
        model.generate(tokens(), attention_mask=padding("left"), pad_token_id=0, **options) for model in (plain, ours)
    )
    assert torch.equal(found, wanted)


@both
def test_a_later_part_of_a_text_sees_the_earlier(make: Maker) -> None:
    """Several tokens at once behind a cache have the logits of the whole text."""
    _, ours = pair(make)
    with torch.no_grad():
        whole = ours(tokens()).logits
        first = ours(tokens()[:, :11], use_cache=True)
        second = ours(tokens()[:, 11:], past_key_values=first.past_key_values, use_cache=True)
    assert off(torch.cat([first.logits, second.logits], 1), whole) < 1e-5


@both
def test_no_mask_of_queries_and_keys_is_made(make: Maker) -> None:
    """A layer gets the keys' mask alone, or none, so that memory stays linear in the length."""
    _, ours = pair(make)
    seen: list[tuple[int, ...]] = []
    for each in ours.modules():
        if "forward" in vars(each):
            each.register_forward_pre_hook(
                lambda _module, _given, named: seen.append(tuple(named["attention_mask"].shape)), with_kwargs=True
            )
    with torch.no_grad():
        ours(tokens())
        ours(tokens(), attention_mask=padding("left"))
    assert seen == [(1, 1, 1, 1)] * LAYERS + [(2, 1, 1, 19)] * LAYERS


@both
def test_detach_gives_everything_back(make: Maker) -> None:
    """Afterwards it is the original to the bit; weights never changed, and attaching twice is attaching once."""
    plain, ours = pair(make)
    assert attach(ours) == LAYERS
    assert plain.state_dict().keys() == ours.state_dict().keys()
    assert detach(ours) == LAYERS
    assert detach(ours) == 0
    with torch.no_grad():
        assert torch.equal(plain(tokens()).logits, ours(tokens()).logits)
    assert ours.config._attn_implementation == plain.config._attn_implementation


def swin(**changes: Any) -> nn.Module:
    """Returns a tiny Swin V2 with random weights; every other block shifts its windows, and so has masks."""
    from transformers import Swinv2Config, Swinv2Model

    torch.manual_seed(0)
    sizes = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    config = Swinv2Config(**{**sizes, "drop_path_rate": 0.0, "initializer_range": 0.5, **changes})
    return Swinv2Model(config).eval()


def images() -> Tensor:
    """Returns two random images."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class TestSwin:
    """Swin V2, whose bias goes through the SVD builder."""

    @pytest.fixture
    def models(self) -> tuple[nn.Module, nn.Module]:
        """A model as it comes, and the same one attached."""
        plain = swin()
        ours = copy.deepcopy(plain)
        assert attach(ours) == 4
        return plain, ours

    def test_outputs_are_those_of_the_original(self, models: tuple[nn.Module, nn.Module]) -> None:
        """Shifted windows and their masks included, and the bias matters: without it the result is another."""
        with torch.no_grad():
            wanted, found = (model(images()).last_hidden_state for model in models)
            assert off(found, wanted) < 1e-4
            for name, each in models[0].named_parameters():
                if "continuous_position_bias_mlp.2" in name:
                    each.zero_()
            assert off(models[0](images()).last_hidden_state, wanted) > 1e-2

    def test_gradients_are_those_of_the_original(self, models: tuple[nn.Module, nn.Module]) -> None:
        """Those of the small network behind the bias too, where nothing of the bias is cut off."""
        attach(models[1], energy=1.0)
        for model in models:
            out = model(images()).last_hidden_state  # normalised: a sum of squares would be a constant
            (out * torch.linspace(-1.0, 1.0, out.numel()).view_as(out)).sum().backward()
        for (name, each), (_, ours) in zip(*(model.named_parameters() for model in models), strict=True):
            if each.grad is not None:
                assert (ours.grad - each.grad).norm() <= 1e-3 * each.grad.norm() + 1e-6, name

    def test_factors_are_made_once_and_again_when_weights_change(self, models: tuple[nn.Module, nn.Module]) -> None:
        """Without gradients a second forward decomposes nothing; a changed weight shows in the next result."""
        plain, ours = models
        with torch.no_grad():
            ours(images())
            before = [vars(each)["_flashbias_factors"][1][0] for each in ours.modules() if "forward" in vars(each)]
            ours(images())
            after = [vars(each)["_flashbias_factors"][1][0] for each in ours.modules() if "forward" in vars(each)]
            assert len(before) == 4
            assert all(one is other for one, other in zip(before, after, strict=True))
            for model in models:
                for name, each in model.named_parameters():
                    if "continuous_position_bias_mlp.2" in name:
                        each.mul_(-1.0)
            wanted, found = (model(images()).last_hidden_state for model in (plain, ours))
            assert off(found, wanted) < 1e-4
        assert ours.state_dict().keys() == plain.state_dict().keys()

    def test_detach_and_refusals(self, models: tuple[nn.Module, nn.Module]) -> None:
        """The original comes back to the bit; dropout of weights, the weights themselves and odd shares are refused."""
        plain, ours = models
        with pytest.raises(UnsupportedError, match="output_attentions"):
            ours(images(), output_attentions=True)
        assert detach(ours) == 4
        with torch.no_grad():
            assert torch.equal(plain(images()).last_hidden_state, ours(images()).last_hidden_state)
        with pytest.raises(UnsupportedError, match="attention dropout"):
            attach(swin(attention_probs_dropout_prob=0.1))
        with pytest.raises(ArgumentError, match="energy: expected a number above 0"):
            attach(swin(), energy=1.5)


def test_a_copy_of_an_attached_model_computes_with_its_own_weights() -> None:
    """A deep copy is attached too, to itself."""
    ours = bloom()
    attach(ours)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for each in ours.parameters():
            each.zero_()
        assert off(other(tokens()).logits, bloom()(tokens()).logits) < 1e-5


def test_what_cannot_be_computed_is_refused() -> None:
    """A model without ALiBi, dropout of attention weights, and a wish for the weights themselves say what to do."""
    with pytest.raises(ArgumentError, match="expected a model with attention layers of BLOOM, MPT or Swin V2"):
        attach(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="attention dropout: expected 0"):
        attach(bloom(attention_dropout=0.1))
    with pytest.raises(UnsupportedError, match="slow_but_exact"):
        attach(bloom(slow_but_exact=True, pretraining_tp=2))
    model = bloom()
    attach(model)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(tokens(), output_attentions=True)
