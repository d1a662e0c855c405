"""``flashbias explain``: which configuration shapes run with on this device, why, and how that is known to be right.

Nothing is launched, tuned or written. The exit code is 0 if every shape has a proven winner, or a pin, that runs here,
else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from flashbias.cli.deferred import Deferred
from flashbias.cli.devices import device as device_of
from flashbias.cli.text import tell


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``explain`` to ``commands``; ``common`` has the flags of every command."""
    parser: Deferred = commands.add_parser(
        "explain", parents=[common], help="which config a shape runs with, and why", description=__doc__
    )
    parser.add_argument("--device", type=int, metavar="N", help="CUDA device (default: the current one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.defer(_add_shapes)
    parser.set_defaults(run=run)


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    from flashbias.cli import shapes

    shapes.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Explains every shape; returns 0 when each has a proven winner or pin that runs here, else 1.

    Raises WrongUsage for flags that are no shape, FlashBiasError where there is no device.
    """
    from flashbias.cli import shapes
    from flashbias.cli.database import WrongUsage
    from flashbias.errors import ArgumentError
    from flashbias.explaining import explain_shape
    from flashbias.settings import settings

    try:
        wanted = shapes.from_arguments(options)
    except ArgumentError as error:
        raise WrongUsage(str(error)) from error
    device = device_of(options.device)
    place = contextlib.nullcontext() if options.cache_dir is None else settings(cache_dir=options.cache_dir)
    with place:
        found = [explain_shape(shape, device) for shape in wanted]
    if options.json:
        rows = [{"shape": shape.model_dump(), **each.to_json()} for shape, each in zip(wanted, found, strict=True)]
        print(json.dumps({"rows": rows}, indent=1))
    else:
        for number, each in enumerate(found):
            tell(["", *each.lines()] if number else each.lines())
    return int(not all(each.proven for each in found))
