"""``flashbias.refresh``: moving on to what has been learned since."""

from __future__ import annotations

import autotune
from flashbias import plans


def refresh() -> None:
    """Has the next call of each problem decided anew, by what the database holds then.

    A process keeps the configs it launched first, and so do the ranks of a job, together, although better ones may have been
    found since: by the sweep that a call did not wait for, by another job, by ``scripts/prewarm.py``. This is the way
    to take them up. **Every rank of a job must call it at the same step**, between two steps: each call begins a new
    agreement, and ranks that have called it a different number of times may launch different configs. It waits for no
    other rank, and deletes nothing. A backward of a compiled graph whose forward ran before it runs as plain PyTorch.
    """
    plans.forget()
    autotune.refresh()
