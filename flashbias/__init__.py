"""Attention with a low-rank bias, run by kernel configurations that were proven right on this GPU.

``flash_bias_func`` computes softmax(q kᵀ · scale + q_bias k_biasᵀ + mask) v and its gradients, and
``flash_bias_varlen_func`` those of packed sequences of different lengths; ``factors`` builds
q_bias and k_bias for well-known biases; ``nn`` has an attention layer made with both; ``settings`` says how
configurations are found, for a block of code; ``explain`` says which one a call runs, and why; ``refresh`` takes up
what was found since. The method is FlashBias (arXiv:2505.12044).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _location(name: str) -> Path | None:
    """Returns the file or folder that ``import name`` means here, None if there is none."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None) if module is not None else importlib.util.find_spec(name)
    if spec is None:
        return None
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places and places[0] else None


def _check_siblings() -> None:
    """Raises ImportError, naming the culprit, unless ``autotune`` and ``cache_db`` lie beside this package.

    Both names are common: a user's own ``autotune.py`` in the working directory comes first on the path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("cache_db", "autotune"):
        found = _location(name)
        if found is None or not found.is_relative_to(home / name):
            got = "found none" if found is None else f"found {found}"
            raise ImportError(
                f"flashbias needs its own package {name!r} from {home / name}, but Python {got}. "
                f"Rename that file or folder, or start Python from another directory or with the option -P "
                f"(it keeps the script's own directory off the import path); if {home / name} is missing, "
                f"reinstall flashbias.",
                name=name,
            )


_check_siblings()

if TYPE_CHECKING:
    from autotune.errors import CacheMiss, SettingsError
    from flashbias import factors, nn
    from flashbias.api import flash_bias_func
    from flashbias.errors import ArgumentError, FlashBiasError, UnsupportedError
    from flashbias.explained import Explanation
    from flashbias.explaining import explain
    from flashbias.merge import merge_attention
    from flashbias.refreshing import refresh
    from flashbias.settings import settings
    from flashbias.varlen.api import flash_bias_varlen_func

__all__ = [
    "ArgumentError",
    "CacheMiss",
    "Explanation",
    "FlashBiasError",
    "SettingsError",
    "UnsupportedError",
    "__version__",
    "explain",
    "factors",
    "flash_bias_func",
    "flash_bias_varlen_func",
    "merge_attention",
    "nn",
    "refresh",
    "settings",
]

_HOMES = {
    "ArgumentError": "flashbias.errors",
    "CacheMiss": "autotune.errors",
    "Explanation": "flashbias.explained",
    "FlashBiasError": "flashbias.errors",
    "SettingsError": "autotune.errors",
    "UnsupportedError": "flashbias.errors",
    "explain": "flashbias.explaining",
    "flash_bias_func": "flashbias.api",
    "flash_bias_varlen_func": "flashbias.varlen.api",
    "merge_attention": "flashbias.merge",
    "refresh": "flashbias.refreshing",
    "settings": "flashbias.settings",
}
_MODULES = {"factors", "nn"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and Triton take seconds, and a tool may only want the version."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    value = getattr(importlib.import_module(_HOMES[name]), name)
    # Found at once from now on. Importing flashbias.settings binds that name to the module, which is callable: it stays.
    globals().setdefault(name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
