"""Attention shapes from command-line flags or a file.

A TOML file holds ``[[shape]]`` tables, a JSON file a list of objects or ``{"shape": [...]}``; both use the fields of
:class:`flashbias.kernels.problem.Shape`. Flags take several values each and mean every combination of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import ValidationError

from flashbias.errors import ArgumentError
from flashbias.kernels.problem import GRADIENTS, MaskDims, MaskKind, Shape
from flashbias.precision import PRECISIONS

# A mask seldom learns: its gradient is asked for by name.
DEFAULT_GRADIENTS: Final = GRADIENTS[:5]
NAMES: Final = (
    "file",
    "batch",
    "nheads",
    "nheads_kv",
    "seqlen_q",
    "seqlen_k",
    "headdim",
    "value_dim",
    "rank",
    "factor_dtype",
    "causal",
    "window",
    "dtype",
    "precision",
    "mask",
    "mask_dims",
    "varlen",
    "grads",
    "layout",
)
"""What the flags are called once they are parsed, the file first."""

MASKS: Final = ", ".join(get_args(MaskKind))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that :func:`from_arguments` reads."""
    parser.add_argument("file", nargs="?", type=Path, help="JSON or TOML file of shapes, instead of the flags below")
    group = parser.add_argument_group("shapes", "each flag takes one or more values; every combination is a shape")

    def flag(name: str, default: object, meaning: str, kind: Any = int, **more: Any) -> None:
        group.add_argument(
            name, nargs="+", type=kind, default=[default], metavar="N" if kind is int else "X", help=meaning, **more
        )

    flag("--batch", 1, "batch size (default 1)")
    flag("--nheads", 16, "number of heads (default 16)")
    flag("--nheads-kv", None, "number of heads of k and v (default: as --nheads)")
    flag("--seqlen-q", 1024, "number of queries (default 1024)")
    flag("--seqlen-k", None, "number of keys (default: as --seqlen-q)")
    flag("--headdim", 64, "head dimension of q and k (default 64)")
    flag("--value-dim", None, "head dimension of v (default: as --headdim)")
    flag("--rank", 8, "rank of the bias, 0 for none (default 8)")
    flag("--factor-dtype", None, "float32, or as --dtype (the default)", str)
    flag("--dtype", "float16", "float16, bfloat16 or float32 (default float16)", str)
    flag("--precision", None, f"of --dtype float32: {', '.join(PRECISIONS)} (default ieee)", str)
    flag("--mask", "none", f"{MASKS} (default none)", str)
    flag("--layout", "aligned", "aligned or strided (default aligned)", str)
    flag("--mask-dims", "matrix", f"{', '.join(get_args(MaskDims))} (default matrix)", str)
    flag("--causal", False, "true, false or bottom_right (default false)", _causal)
    flag("--window", (-1, -1), "LEFT,RIGHT keys seen beside a query's own, -1 for no limit (default -1,-1)", _window)
    flag("--varlen", False, "true: --batch packed sequences, the lengths are the largest (default false)", _switch)
    flag("--grads", DEFAULT_GRADIENTS, "gradients wanted: all (but a mask's), none, or e.g. q,k,v,mask", _gradients)


def from_arguments(arguments: argparse.Namespace) -> list[Shape]:
    """Returns the shapes that the parsed flags, or the file named among them, ask for.

    Raises ArgumentError for a file that cannot be read and for values a shape cannot have.
    """
    if arguments.file is not None:
        return from_file(arguments.file)
    return [_shape(values, "flags") for values in _combinations(arguments)]


def from_file(path: Path) -> list[Shape]:
    """Returns the shapes listed in a JSON or TOML file.

    Raises ArgumentError, naming the file and the entry, when it cannot be read or an entry is no shape.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"shapes file {path}: cannot be read as {path.suffix or 'JSON'}: {error}") from error
    entries = content.get("shape") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ArgumentError(
            f"shapes file {path}: expected a list of shapes ([[shape]] tables in TOML), got {type(entries).__name__}"
        )
    return [_shape(entry, f"shapes file {path}, shape {number}") for number, entry in enumerate(entries, start=1)]


def _combinations(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = NAMES[1:]
    for values in itertools.product(*(getattr(arguments, name) for name in names)):
        yield dict(zip(names, values, strict=True))


def _shape(values: Mapping[str, Any], place: str) -> Shape:
    """Returns the shape of ``values``, with as many keys as queries unless they say otherwise."""
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{place}: expected a table of fields, got {values!r}")
    known = {name: value for name, value in values.items() if value is not None}
    if "seqlen_q" in known:
        known.setdefault("seqlen_k", known["seqlen_q"])
    try:
        return Shape.model_validate_json(json.dumps(known))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'shape'}: {fault['msg']}, got {fault['input']!r}"
            for fault in error.errors()
        )
        raise ArgumentError(f"{place}: {faults}") from error


def _causal(text: str) -> bool | str:
    values: dict[str, bool | str] = {"true": True, "false": False, "bottom_right": "bottom_right"}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected true, false or bottom_right, got {text!r}") from None


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _window(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LEFT,RIGHT, two numbers, got {text!r}") from None


def _gradients(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return DEFAULT_GRADIENTS if text == "all" else ()
    return tuple(text.split(","))
