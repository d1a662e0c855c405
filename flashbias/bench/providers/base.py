"""What a provider is, and the inputs most peers want: factors put beside q and k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.bench.inputs import Inputs

Forward = Callable[[Inputs], Tensor]
MULTIPLE = 8  # of columns: what SDPA's backends and xFormers want, 16 bytes of a 16-bit dtype
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def nothing(_inputs: Inputs) -> str:
    """Returns that there is no reason against."""
    return ""


def nameless(_inputs: Inputs) -> dict[str, str]:
    """Returns that there is nothing to tell of what ran."""
    return {}


@dataclass(frozen=True)
class Provider:
    """One way to compute attention with a low-rank bias.

    ``run`` returns O (B, Sq, H, Dv), differentiable. ``refuses`` gives a reason why it cannot run on these inputs here,
    "" where it may try. ``rehearse`` does the same by running it in a child process, for one that may take its process
    along. ``matrices`` is about how many tensors of a number for each score, in q's dtype, live at once in its forward and
    backward. ``floor``: it leaves the bias out, so it is another function. ``own``: it is ours, not a peer.
    ``chosen`` tells what runs by kernel. Its backward is timed on a graph that is kept, as ``torch.autograd.grad``.
    """

    run: Forward
    refuses: Callable[[Inputs], str] = nothing
    rehearse: Callable[[Inputs], str] = nothing
    matrices: float = 0.0
    floor: bool = False
    own: bool = False
    chosen: Callable[[Inputs], dict[str, str]] = nameless

    def bytes(self, inputs: Inputs) -> int:
        """Returns about how much memory it needs beside the inputs: copies, gradients, and its matrices of scores."""
        shape = inputs.shape
        matrix = shape.batch * shape.nheads * shape.seqlen_q * shape.seqlen_k * inputs.q.element_size()
        return int(self.matrices * matrix) + 3 * inputs.bytes


def concatenated(inputs: Inputs, multiple: int = MULTIPLE) -> tuple[Tensor, Tensor]:
    """Returns [q·scale, q_bias, 0] (B, Sq, H, columns) and [k, k_bias, 0], zeros up to a multiple of columns.

    Plain attention of the two with scale 1 is attention with the bias. Factors are brought to the dtype of q and k.
    """
    q_parts, k_parts = [inputs.q * inputs.scale], [inputs.k]
    if inputs.q_bias is not None and inputs.k_bias is not None:
        q_parts.append(inputs.q_bias.to(inputs.q.dtype))
        k_parts.append(inputs.k_bias.to(inputs.k.dtype))
    room = -sum(part.shape[3] for part in q_parts) % multiple
    if room:
        q_parts.append(inputs.q.new_zeros((*inputs.q.shape[:3], room)))
        k_parts.append(inputs.k.new_zeros((*inputs.k.shape[:3], room)))
    return torch.cat(q_parts, -1), torch.cat(k_parts, -1)


def for_each_head(tensor: Tensor, inputs: Inputs) -> Tensor:
    """Returns a (B, S, Hkv, columns) tensor with a head for each head of q: a copy under grouped heads."""
    return tensor if inputs.group == 1 else tensor.repeat_interleave(inputs.group, dim=2)


def needs_cuda(inputs: Inputs) -> str:
    """Returns the reason against tensors that are not on a GPU."""
    return "" if inputs.q.device.type == "cuda" else "needs a CUDA device"


def needs_16_bits(inputs: Inputs) -> str:
    """Returns the reason against other dtypes than fp16 and bf16."""
    return "" if inputs.q.dtype in _SIXTEEN_BITS else f"takes float16 and bfloat16, not {inputs.shape.dtype}"
