"""One rank of a small training run, or the single process that does the work of all: ``python -m tests.gpu.ranks_child``.

The model is two attention layers with a learned low-rank bias, fp32 weights under autocast. Every rank sees its own part of
each batch; gradients are averaged by all_reduce. With ``--parts N`` one process takes N parts after each other instead.
What it found goes to ``--output`` as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from autotune import tuner
from flashbias.nn import FlashBiasAttention


class LearnedBias(nn.Module):
    """A bias of rank 8 between places, with both factors learned."""

    def __init__(self, nheads: int, length: int) -> None:
        super().__init__()
        self.q_bias, self.k_bias = (nn.Parameter(0.1 * torch.randn(1, length, nheads, 8)) for _ in range(2))

    def forward(self, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
        """Returns the factors of the first places."""
        return self.q_bias[:, :seqlen_q], self.k_bias[:, :seqlen_k]


class Model(nn.Module):
    """Two attention layers."""

    def __init__(self, width: int, nheads: int, length: int) -> None:
        super().__init__()
        biases = [LearnedBias(nheads, length) for _ in range(2)]
        self.layers = nn.ModuleList(FlashBiasAttention(width, nheads, bias=bias, causal=True) for bias in biases)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the layers make of x (B, S, E), and the sum of both."""
        first = self.layers[0](x)
        return first + self.layers[1](first)


class Sweeps(logging.Handler):
    """Counts the sweeps of this process."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Looks for the message that begins one."""
        self.count += "tuning in a child process" in record.getMessage()


def batch(step: int, part: int, length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns input and target of one part of one step, the same wherever it is drawn."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    x = torch.randn(2, length, width, generator=generator)
    means = x.cumsum(1) / torch.arange(1, length + 1).view(1, -1, 1)
    return x.to(device), (4 * means).to(device)


def main() -> None:
    """Trains, and writes what was launched and what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--headdim", type=int, default=64)
    parser.add_argument("--own", type=Path, help="give each rank a database of its own in this folder")
    options = parser.parse_args()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.own is not None:
        os.environ["FLASHBIAS_CACHE_DIR"] = str(options.own / str(rank))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if size > 1:
        distributed.init_process_group("nccl" if gpus >= size else "gloo")
    sweeps = Sweeps()
    logging.basicConfig(level=logging.INFO, format=f"rank {rank}: %(name)s: %(message)s")
    logging.getLogger("autotune").addHandler(sweeps)

    torch.manual_seed(0)
    width = 4 * options.headdim
    model = Model(width, 4, options.length).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    parts = range(options.parts) if options.parts else range(rank, rank + 1)
    total = options.parts or size
    losses, seconds = [], []
    for step in range(options.steps):
        started = time.monotonic()
        optimizer.zero_grad()
        lost = torch.zeros((), device=device)
        for part in parts:
            x, target = batch(step, part, options.length, width, device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = nn.functional.mse_loss(model(x).float(), target)
            loss.backward()
            lost += loss.detach()
        for tensor in [lost, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]:
            if size > 1:
                _add_up(tensor, host=gpus < size)
            tensor.div_(total)
        optimizer.step()
        losses.append(lost.item())
        seconds.append(time.monotonic() - started)
    decided = {key[0].hash: found for key, found in tuner._process.decided.items()}  # type: ignore[index]
    configs = {
        name: {kernel: choice.config.hash for kernel, choice in each.choices.items()} for name, each in decided.items()
    }
    rungs = sorted({choice.rung for each in decided.values() for choice in each.choices.values()})
    told = {"losses": losses, "seconds": seconds, "configs": configs, "rungs": rungs, "sweeps": sweeps.count}
    options.output.with_name(f"{options.output.name}{rank}").write_text(json.dumps(told), encoding="utf-8")
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def _add_up(tensor: Tensor, *, host: bool) -> None:
    """Sums ``tensor`` over all ranks in place; gloo does so on the host."""
    if host and tensor.is_cuda:
        copy = tensor.cpu()
        distributed.all_reduce(copy)
        tensor.copy_(copy)
    else:
        distributed.all_reduce(tensor)


if __name__ == "__main__":
    main()
