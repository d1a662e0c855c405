"""The inputs on which attention kernels are timed and proven.

Sizes are chosen against what goes wrong: lengths that end in the middle of a tile, Sq != Sk, ranks below the
packed width, shared factors, logits and biases far from zero, rows with no key, and a race case of little more
than one wave, where neighbours in time share a multiprocessor.

Inputs are kept well-conditioned, because where even the ideal 16-bit kernel is far off nothing is proven. Logits
have a standard deviation of about 0.6: a softmax that puts all weight on one key has gradients of almost nothing,
the difference of large numbers. Large logits are large by a constant of the row, which the softmax ignores and a
kernel must survive.
"""

from __future__ import annotations

import zlib
from typing import Final

import torch
from torch import Tensor

from autotune.device import DeviceInfo
from autotune.spec import Case, Tensors
from cache_db.models import Problem, Scalar
from flashbias.band import Band
from flashbias.kernels import few_queries
from flashbias.kernels.problem import FEW_QUERIES, wanted
from flashbias.rounding import tf32

# Query tiles of 128 rows per multiprocessor that stand for each occupancy class.
_TILES: Final = {"<1": 0.5, "1-4": 2.0, ">4": 8.0}
_MAX_HEADS: Final = 64
SHORTEST: Final = 128  # the least length that is a bucket, but for few queries, which stay as they are
_MAX_MASK: Final = 1 << 28
_RACE_ROWS: Final = 505
_INTERPRETED_ROWS: Final = 40


def representative(problem: Problem, device: DeviceInfo) -> Case:
    """Returns the sizes that are timed: the buckets' own lengths, heads after the occupancy class."""
    seqlen_q, seqlen_k = int(problem.fields["seqlen_q"]), int(problem.fields["seqlen_k"])
    if device.interpreted:
        return _case("representative", problem, 1, 2, min(seqlen_q, 64), min(seqlen_k, 64))
    tiles = _TILES[str(problem.fields["occupancy"])] * device.sm_count
    pairs = max(1, round(tiles / -(-seqlen_q // 128)))
    batch = -(-pairs // _MAX_HEADS)
    return _case("representative", problem, batch, -(-pairs // batch), seqlen_q, seqlen_k)


def smaller(problem: Problem, case: Case) -> Case | None:
    """Returns the timed ``case`` in half the size, None where its lengths are the least that their buckets can mean."""
    sizes = {name: int(case.sizes[name]) for name in ("batch", "nheads", "seqlen_q", "seqlen_k")}
    found = halved(problem, **sizes)
    return None if found is None else _case(case.name, problem, *found)


def halved(problem: Problem, batch: int, nheads: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int, int] | None:
    """Returns half the batch (of packed sequences: their number), else half the heads, else half the lengths, else None.

    Whole groups of query heads stay together. The first of these is taken that leaves a 128-row query tile to every
    multiprocessor, if there are so many; a step that would not is taken only where no other is left.
    """
    group = int(problem.fields["gqa_group"])
    shorter_q = max(seqlen_q // 2, SHORTEST) if seqlen_q > SHORTEST else seqlen_q
    shorter_k = max(seqlen_k // 2, min(seqlen_k, SHORTEST))
    sizes = (batch, nheads, seqlen_q, seqlen_k)
    steps = (
        (max(batch // 2, 1), nheads, seqlen_q, seqlen_k),
        (batch, max(nheads // group // 2, 1) * group, seqlen_q, seqlen_k),
        (batch, nheads, shorter_q, shorter_k),
        (batch, nheads, seqlen_q, shorter_k),
    )
    open_ = [step for step in steps if step != sizes]
    enough = min(problem.sm_count, _tiles(sizes))
    return next((step for step in open_ if _tiles(step) >= enough), open_[0] if open_ else None)


def _tiles(sizes: tuple[int, int, int, int]) -> int:
    return sizes[0] * sizes[1] * -(-sizes[2] // 128)


def proof(problem: Problem, device: DeviceInfo) -> list[Case]:
    """Returns the proof's cases; the first alone is the quick proof."""
    if int(problem.fields["seqlen_q"]) <= FEW_QUERIES:
        listed = few_queries.INTERPRETED_PROOF if device.interpreted else few_queries.PROOF
        return [_case(name, problem, *sizes, **options) for name, sizes, options in listed]
    if device.interpreted:
        return [
            _case("ragged", problem, 1, 2, _INTERPRETED_ROWS, _INTERPRETED_ROWS + 9),
            _case("large logits", problem, 2, 1, 17, 33, logit=200.0, dlse=True, mask_dims="batch"),
            _case("positions", problem, 1, 2, 33, 40, positions=True),
        ]
    return [
        _case("ragged", problem, 2, 3, 203, 331),
        _case("short", problem, 3, 2, 17, 22, dlse=True, mask_dims="batch"),
        _case("one query", problem, 2, 2, 1, 239),
        _case("one key", problem, 2, 2, 67, 1),
        _case("cross", problem, 1, 2, 1023, 513, dlse=True),
        _case("long", problem, 1, 2, 1151, 2049),
        _case("large logits", problem, 1, 4, 300, 301, logit=200.0),
        _case("shared factors", problem, 2, 4, 257, 255, shared=True, dlse=True),
        _case("negative bias", problem, 1, 4, 300, 333, bias=-60.0),
        _case("positions", problem, 2, 4, 240, 257, positions=True, mask_dims="batch heads"),
    ]


def race(problem: Problem, device: DeviceInfo) -> Case:
    """Returns sizes of 1.25 waves of 64-row tiles at two blocks a multiprocessor, or what splits of few queries need."""
    if int(problem.fields["seqlen_q"]) <= FEW_QUERIES:
        group = int(problem.fields["gqa_group"])
        few = few_queries.race_sizes(device.sm_count, group)
        return _case("race", problem, *(few_queries.INTERPRETED_RACE if device.interpreted else few))
    if device.interpreted:
        return _case("race", problem, 1, 1, _INTERPRETED_ROWS, _INTERPRETED_ROWS)
    # Under grouped queries a key tile is walked once for each group, so it takes more heads, over fewer queries.
    group = int(problem.fields["gqa_group"])
    pairs = group * round(1.25 * 2 * device.sm_count / -(-_RACE_ROWS // 64))
    return _case("race", problem, 1, pairs, max(65, _RACE_ROWS // group), _RACE_ROWS)


def _case(
    name: str,
    problem: Problem,
    batch: int,
    nheads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    logit: float = 0.0,
    bias: float = 0.0,
    shared: bool = False,
    positions: bool = False,
    dlse: bool = False,
    mask_dims: str = "heads",
) -> Case:
    """Returns a case; ``nheads`` is rounded up to whole groups of a key head.

    ``dlse`` gives LSE a gradient; ``mask_dims`` are those of batch and heads that a mask has.
    """
    fields = problem.fields
    group = int(fields["gqa_group"])
    nheads_kv = -(-nheads // group)
    nheads = nheads_kv * group
    sizes: dict[str, Scalar] = {
        "batch": batch,
        "nheads": nheads,
        "nheads_kv": nheads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "rank": _rank(problem, name),
        "factor_batch": 1 if shared else batch,
        "q_factor_nheads": 1 if shared else nheads,
        # Under grouped queries k_bias may have a head for each query head, for each key head, or one.
        "k_factor_nheads": 1 if shared else nheads_kv if dlse else nheads,
        "logit": logit,
        "bias": bias,
        "positions": positions,
        "dlse": dlse,
        "mask_dims": mask_dims,
    }
    return Case(name, sizes)


def _rank(problem: Problem, name: str) -> int:
    """Returns the rank of the case's factors: below the packed width, so that padding columns are seen.

    It is above half of it where the next smaller width is half, and all of it where the problem is one whose factors
    fill their width.
    """
    width, blocks = int(problem.fields["rank_dim"]), max(1, int(problem.fields["factor_parts"]))
    used = width * 5 // 8 if name in ("ragged", "long") else width // 4 if name == "one query" else width // 2
    if "q_bias" in wanted(problem) and not problem.fields["ones_column"]:
        used = width
    return max(1, used // blocks) if width else 0


def band_of(problem: Problem, seqlen_q: int, seqlen_k: int) -> Band:
    """Returns the diagonals seen in a case of these lengths.

    It follows from the lengths alone: aligned bottom-right where the number of keys is odd (which leaves rows without
    a key where there are more queries) or at least twice that of queries, as with a cache, else top-left; a window is
    that of the problem, at most half of the keys.
    """
    shift = seqlen_k - seqlen_q if seqlen_k % 2 or seqlen_k >= 2 * seqlen_q else 0
    window = min(int(problem.fields["window"]), seqlen_k // 2 + 1)
    return Band(window - 1 - shift if window else None, shift if problem.fields["causal"] else None)


def inputs(problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
    """Returns the case's tensors; a strided problem gets rows that start off a 16-byte boundary."""
    fields = problem.fields
    drawn = (seed * 1_000_003 + zlib.crc32(case.name.encode())) % (1 << 64)  # any 64-bit seed is one
    generator = torch.Generator(device).manual_seed(drawn)
    dtype = getattr(torch, str(fields["dtype"]))
    batch, nheads, nheads_kv, seqlen_q, seqlen_k, rank, factor_batch = (
        int(case.sizes[name])
        for name in ("batch", "nheads", "nheads_kv", "seqlen_q", "seqlen_k", "rank", "factor_batch")
    )
    strided = problem.layout == "strided"

    def normal(*shape: int, factor: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * factor
        if not strided:
            return values.to(kind)
        room = torch.zeros((*shape[:-1], shape[-1] + 3), dtype=kind, device=device)
        return room[..., 1:-2].copy_(values)

    head_dim, value_dim = int(fields["head_dim"]), int(fields["value_dim"])
    found = {
        "q": normal(batch, seqlen_q, nheads, head_dim, factor=0.5),
        "k": normal(batch, seqlen_k, nheads_kv, head_dim),
        "v": normal(batch, seqlen_k, nheads_kv, value_dim),
        "dout": normal(batch, seqlen_q, nheads, value_dim),
    }
    if case.sizes["dlse"] and fields["grads"]:
        found["dlse"] = torch.randn((batch, nheads, seqlen_q), generator=generator, device=device)
    if rank:
        heads = (int(case.sizes[name]) for name in ("q_factor_nheads", "k_factor_nheads"))
        kind = getattr(torch, str(fields["factor_dtype"]))
        size = rank**-0.25
        found["q_bias"] = normal(factor_batch, seqlen_q, next(heads), rank, factor=0.5 * size, kind=kind)
        found["k_bias"] = normal(factor_batch, seqlen_k, next(heads), rank, factor=size, kind=kind)
        _shift_rows(found["q_bias"], found["k_bias"], float(case.sizes["bias"]))
        if case.sizes["positions"]:
            _add_positions(found["q_bias"], found["k_bias"])
    # Even rows far above zero, odd rows far below it.
    _shift_rows(found["q"][:, ::2], found["k"], float(case.sizes["logit"]) * head_dim**0.5)
    _shift_rows(found["q"][:, 1::2], found["k"], -float(case.sizes["logit"]) * head_dim**0.5)
    if case.sizes["logit"] and dtype == torch.float32:
        # 200 must be 200 in tf32 too, as it is in 16 bits: else whole rows of scores move, and LSE with them.
        found["q"].copy_(tf32(found["q"]))
    if fields["mask"] != "none":
        found["mask"] = _mask(str(fields["mask"]), mask_shape(problem, case), generator, device)
    return found


def mask_shape(problem: Problem, case: Case) -> tuple[int, ...]:
    """Returns the mask's shape: a vector, or a matrix for each head, only one if that is too large, or one row of it."""
    batch, nheads, rows, keys = (int(case.sizes[name]) for name in ("batch", "nheads", "seqlen_q", "seqlen_k"))
    dims = str(problem.fields["mask_dims"]).replace("any", "matrix")
    rows = rows if dims == "matrix" else 1
    own = str(case.sizes["mask_dims"]).split()
    shared = (batch if "batch" in own else 1, nheads if "heads" in own else 1)
    if shared[0] * shared[1] * rows * keys <= _MAX_MASK:
        return *shared, rows, keys
    # The gradient of a matrix has rows; without it one row, read for every query, takes as long as a matrix.
    return 1, 1, rows if rows * keys <= _MAX_MASK or "mask" in wanted(problem) else 1, keys


def _shift_rows(rows: Tensor, columns: Tensor, shift: float) -> None:
    """Changes the matrices so that each row of ``rows @ columns.mT`` gains a constant of about ``shift``.

    Half of the inner dim carries it, with a spread as large as its mean: a single column would make gradient rows of
    one number, and some of those are nearly zero.
    """
    inner = rows.shape[3] // 2
    if shift and inner:
        rows[..., :inner] = (rows[..., :inner] / rows[..., :inner].std() + 1.0) * (shift / inner)
        columns[..., :inner] = 1.0


def _add_positions(q_bias: Tensor, k_bias: Tensor) -> None:
    """Makes the first columns ALiBi's: a slope for each head, times the key's position.

    Positions are large next to their spread among the keys that a row sees, and exact in 8 bits up to 256 keys.
    """
    slopes = torch.logspace(-3, -6, q_bias.shape[2], base=2.0, device=q_bias.device)
    q_bias[..., 0] = slopes
    k_bias[..., 0] = torch.arange(k_bias.shape[1], device=k_bias.device)[:, None]


def _mask(kind: str, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Returns a random mask in which every seventh row sees no key; an additive one has rows that are finite but lowest."""
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if kind == "bool":
        mask = values > -0.7
        if shape[2] > 1:
            mask[..., ::7, :] = False
        return mask
    values *= 0.5
    values[values < -1.0] = -torch.inf
    if shape[2] > 1:
        values[..., ::7, :] = -torch.inf
    mask_dtype: torch.dtype = getattr(torch, kind)
    mask = values.to(mask_dtype)
    if kind != "float16" and shape[2] > 1:  # -65504 leaves of a fp32 logit what not even the ideal kernel can tell
        mask[..., 3::7, :] = max(torch.finfo(mask_dtype).min, torch.finfo(torch.float32).min)
    return mask
