"""The sizes on which problems of at most 64 queries are proven: few rows, and keys enough for several splits.

How many splits there are follows from sizes, so cases of the lengths that other problems use would prove none.
"""

from __future__ import annotations

from typing import Any, Final

Sizes = tuple[int, int, int, int]

# (name, (batch, heads, queries, keys), options), the quick proof first.
PROOF: Final[tuple[tuple[str, Sizes, dict[str, Any]], ...]] = (
    ("ragged", (2, 3, 17, 4097), {}),
    ("short", (3, 2, 5, 22), {"dlse": True, "mask_dims": "batch"}),
    ("one query", (2, 2, 1, 2049), {}),
    ("one key", (2, 2, 33, 1), {}),
    ("cross", (1, 2, 64, 27), {"dlse": True}),
    ("level", (2, 2, 48, 56), {}),
    ("long", (1, 2, 50, 8193), {}),
    ("large logits", (1, 4, 40, 1301), {"logit": 200.0}),
    ("shared factors", (2, 4, 20, 1255), {"shared": True, "dlse": True}),
    ("negative bias", (1, 4, 30, 1333), {"bias": -60.0}),
    ("positions", (2, 4, 24, 257), {"positions": True, "mask_dims": "batch heads"}),
)
INTERPRETED_PROOF: Final[tuple[tuple[str, Sizes, dict[str, Any]], ...]] = (
    ("ragged", (1, 2, 9, 131), {}),
    ("large logits", (2, 1, 17, 33), {"logit": 200.0, "dlse": True, "mask_dims": "batch"}),
    ("positions", (1, 1, 33, 97), {"positions": True}),
)
INTERPRETED_RACE: Final[Sizes] = (1, 1, 20, 100)


def race_sizes(sm_count: int, group: int) -> Sizes:
    """Returns the sizes of the race case: more than one wave of 16-row tiles, split or not.

    Two such tiles for three quarters of the multiprocessors are one and a half programs for each; from two waves on,
    and with taller tiles from one, splits at least double that.
    """
    return 1, -(-3 * sm_count // (4 * group)) * group, 17, 1023
