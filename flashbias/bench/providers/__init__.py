"""The ways to compute attention with a low-rank bias, by name. What is heavy is imported when its provider is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flashbias.bench.providers import dense, flash4, flex, ours, sdpa, upstream, xformers
from flashbias.bench.providers.base import Provider
from flashbias.errors import ArgumentError

__all__ = ["Provider", "catalogue"]


def catalogue(folder: Path | None = None, names: Sequence[str] = ()) -> Mapping[str, Provider]:
    """Returns the providers called ``names``, all without any; ``folder`` is where upstream's files are.

    Raises ArgumentError for an unknown name and for a folder without upstream's files.
    """
    found = {
        **ours.providers(),
        **upstream.providers(folder if not names or {"upstream", "upstream-dense"} & set(names) else None),
        **flash4.providers(),
        **sdpa.providers(),
        **flex.providers(),
        **xformers.providers(),
        **dense.providers(),
    }
    for name in names:
        if name not in found:
            raise ArgumentError(f"providers: expected some of {', '.join(found)}, got {name!r}")
    return {name: provider for name, provider in found.items() if not names or name in names}
