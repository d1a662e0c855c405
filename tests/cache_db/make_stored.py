"""Makes the stored database of today's schema: ``TRITON_INTERPRET=1 python -m tests.cache_db.make_stored``, from the root.

To be run once for each schema version, before it is released. What it made is then never made anew: ``test_stored.py``
promises that every later version of the library reads it. Its rows are those of a real sweep in Triton's interpreter, with
another host's name, and one example of each other kind.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from autotune import Settings, resolve
from autotune.device import describe
from cache_db import packs, schema, snapshot
from cache_db.batch import Batch, Shared
from cache_db.layers import FILE_NAME
from cache_db.models import Lift, Trial, Verification, Winner
from cache_db.store import Store
from tests.autotune.planted_spec import planted_problem
from tests.cache_db import store_examples as examples

HOST = "node-1"


def main() -> None:
    """Sweeps, fills the file, and writes what is in it as text beside it."""
    path = Path(__file__).parent / "stored" / f"schema-{schema.SCHEMA_VERSION}.sqlite"
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        swept = Path(folder) / "swept"
        resolve(planted_problem("32 64:zeroed_row", "32"), describe(-1), Settings(cache_dir=swept))
        store = Store.open(Path(folder) / "filled.db")
        snapshot.fill(store, (_moved(row) for row in _rows(Store.open(swept / FILE_NAME))))
        odd = examples.trial(
            figures={"ms": 0.5, "worst": float("inf"), "none": float("nan"), "ragged": True, "n": 2**40}
        )
        store.merge(Batch.of([odd, examples.winner(), examples.verification(), examples.lift(32)]))
        store.put_pin(examples.pin())
        path.unlink(missing_ok=True)
        snapshot.write(store, path)
        with path.with_suffix(".jsonl").open("w", encoding="utf-8") as stream:
            packs.write(store.by_problem(), stream)


def _rows(store: Store) -> list[Shared]:
    return [*store.find(Winner), *store.find(Trial), *store.find(Verification), *store.find(Lift)]


def _moved(row: Shared) -> Shared:
    """Returns ``row`` as another machine would have it: the name of this one is nobody's business."""
    return row if isinstance(row, Winner) else row.model_copy(update={"host": HOST})


if __name__ == "__main__":
    main()
