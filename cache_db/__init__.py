"""The tuning database: what was tried, what was proven, what won.

``open_layers`` is the door for callers; ``cache_db.models`` holds the rows. Importing this package loads
neither SQLAlchemy nor a driver: that happens when a database is opened.
"""

from cache_db.errors import CacheError
from cache_db.layers import Layers, open_layers
from cache_db.models import (
    FINAL,
    Agreement,
    Config,
    Environment,
    Lease,
    Lift,
    Pin,
    Problem,
    Scalar,
    Trial,
    Verdict,
    Verification,
    Winner,
)
from cache_db.origins import Origin

__all__ = [
    "FINAL",
    "Agreement",
    "CacheError",
    "Config",
    "Environment",
    "Layers",
    "Lease",
    "Lift",
    "Origin",
    "Pin",
    "Problem",
    "Scalar",
    "Trial",
    "Verdict",
    "Verification",
    "Winner",
    "open_layers",
]
