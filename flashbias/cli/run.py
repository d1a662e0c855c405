"""``flashbias run``: runs one stored config alone, in this process, for a profiler to look at.

    ncu --profile-from-start off flashbias run --key 3f2a --config 91bc

sees its launches and nothing else. Nothing is judged and nothing is stored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from autotune.messages import summary
from cache_db.models import Config, Scalar, Trial
from flashbias.cli.database import (
    WrongUsage,
    add_spec,
    check_spec,
    key_of,
    one_trial,
    open_store,
    prefix,
    short,
    through,
)
from flashbias.cli.devices import device as device_of
from flashbias.cli.text import printable, tell
from flashbias.cli.verify import seed as seed_of
from flashbias.errors import FlashBiasError

if TYPE_CHECKING:
    from autotune.alone import Alone
    from autotune.spec import Case

MOST_ITERATIONS: Final = 100_000
_TIMES: Final = frozenset({"ms", "p20", "p80", "samples", "paired"})
_RISK: Final = (
    "`flashbias verify` with this key and config proves it again, in a process of its own. Here it may crash or hang "
    "this process, and nothing is stored; to run it all the same: --unsafe"
)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``run`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "run",
        parents=[common],
        help="run one stored config alone, for a profiler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--key", type=prefix, required=True, help="first digits of the hash of the key")
    parser.add_argument("--config", type=prefix, required=True, help="first digits of the config's hash")
    parser.add_argument("--iterations", type=_iterations, default=10, metavar="N", help="launches (default 10)")
    parser.add_argument("--case", default="representative", metavar="NAME", help="sizes to run (default: those timed)")
    parser.add_argument("--seed", type=seed_of, help="draw other inputs (default: those of the stored trial)")
    parser.add_argument("--device", type=int, metavar="N", help="CUDA device (default: the current one)")
    parser.add_argument("--unsafe", action="store_true", help="run it even if it is not proven safe")
    add_spec(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the config and prints its times and figures; returns 0.

    Raises WrongUsage for a trial of another device and an unknown case, FlashBiasError for a config that is not proven,
    AutotuneError when it fails.
    """
    store = open_store(options.cache_dir)
    trial = one_trial(store, options.key, options.config)
    check_spec(trial.problem, options.specs)
    upstream = through(store, trial)
    device = device_of(options.device)
    from autotune.alone import Alone
    from autotune.reproof import mismatch
    from cache_db import Layers

    reason = mismatch(trial.problem, device)
    if reason is not None:
        raise WrongUsage(f"the trial cannot be run here: {reason}. Run this where the trial was made")
    alone = Alone(trial, upstream, device)
    doubt = alone.doubt(Layers(store.path))
    if doubt and not options.unsafe:
        raise FlashBiasError(f"{doubt}. {_RISK}")
    case = _case(alone, options.case)
    seed = trial.seed if options.seed is None else options.seed
    _tell(f"running {trial.kernel} {trial.config} on {device.name}{f', unsafe: {doubt}' if doubt else ''}")
    figures = alone.run(case, seed, options.iterations)
    tell(_lines(trial, upstream, case, seed, figures, interpreted=device.interpreted))
    return 0


def _case(alone: Alone, name: str) -> Case:
    cases = alone.cases
    if name not in cases:
        raise WrongUsage.explain("--case", expected=f"one of {', '.join(map(repr, cases))}", got=repr(name))
    return cases[name]


def _lines(
    trial: Trial,
    upstream: Mapping[str, Config],
    case: Case,
    seed: int,
    figures: Mapping[str, Scalar],
    *,
    interpreted: bool,
) -> Iterator[str]:
    yield f"key        {short(key_of(trial))}  {trial.kernel} of {summary(trial.problem)}"
    yield f"config     {short(trial.config.hash)}  {trial.config}"
    for kernel, config in upstream.items():
        yield f"through    {kernel} {short(config.hash)}  {config}"
    sizes = " ".join(f"{name}={value}" for name, value in case.sizes.items())
    yield f"case       {case.name}: {sizes}, seed {seed}"
    where = "in Triton's interpreter: these are not speeds" if interpreted else "with a cold L2"
    yield (
        f"time       {figures['ms']:.4g} ms (p20 {figures['p20']:.4g}, p80 {figures['p80']:.4g}) "
        f"of {figures['samples']} launches, {where}"
    )
    for name, value in figures.items():
        if name not in _TIMES:
            yield f"{name:11}{value:.4g}" if isinstance(value, float) else f"{name:11}{value}"


def _tell(text: str) -> None:
    print(f"run: {printable(text)}", file=sys.stderr, flush=True)


def _iterations(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:12]) <= MOST_ITERATIONS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MOST_ITERATIONS}, got {text!r}")
    return int(text)
