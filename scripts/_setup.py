"""Makes the virtual environment that the commands beside this file run in. Standard library only.

It looks at the machine first and says every cure at once, says what will be downloaded, leaves the choice of index
to pip's own configuration, and does nothing when the environment is already what pyproject.toml and constraints.txt ask for.
"""

import sys

if sys.version_info < (3, 11):
    raise SystemExit(
        "FlashBias needs Python 3.11 or newer, this is %d.%d (%s). Install a newer one (Debian, Ubuntu: "
        "apt install python3.12 python3.12-venv python3.12-dev) and run: python3.12 %s"
        % (sys.version_info[0], sys.version_info[1], sys.executable, " ".join(sys.argv))
    )

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Self

import _machine
from _machine import Machine

ROOT = Path(__file__).resolve().parent.parent
STAMP = "flashbias-setup.json"

# Where pip has to bring torch for a GPU, it brings the pair the gate was measured with; this torch bounds setuptools itself.
GPU_PINS = {"torch": "torch==2.11.0", "triton": "triton==3.6.0", "setuptools": ""}

# Measured: torch's CPU wheel and Triton are 0.4 GB to fetch and 1.6 GB on disk, CUDA's libraries bring it to the larger figures.
CPU_GIGABYTES, CUDA_GIGABYTES, BORROWED_GIGABYTES = (0.4, 2.5), (3.5, 10.0), (0.05, 0.5)


@dataclass(frozen=True)
class Options:
    """What the user asked for: where the environment lies, and where wheels lie when there is no index."""

    venv: Path
    wheels: Path | None

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / "bin" / "python"


@dataclass(frozen=True)
class Stamp:
    """What an environment was made from: ``base`` needs a new one when it changes, ``digest`` only pip."""

    base: str
    digest: str
    extras: tuple[str, ...]
    borrowed: bool

    @classmethod
    def read(cls, venv: Path) -> Self | None:
        """Returns the stamp in ``venv``, None where there is none to trust."""
        try:
            data = json.loads((venv / STAMP).read_text(encoding="utf-8"))
            return cls(data["base"], data["digest"], tuple(data["extras"]), bool(data["borrowed"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, venv: Path) -> None:
        """Leaves this stamp in ``venv``."""
        (venv / STAMP).write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every command takes."""
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to make (default: .venv)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install offline, from the wheels in DIR")


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its status; Ctrl-C ends it without a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        sys.exit(130)


def options(arguments: argparse.Namespace) -> Options:
    """Returns the common options out of ``arguments``."""
    wheels: Path | None = arguments.wheels
    if wheels is not None and not any(wheels.glob("*.whl")):
        raise SystemExit(f"--wheels {wheels}: expected a folder with .whl files, found none there.")
    return Options(arguments.venv.absolute(), wheels.absolute() if wheels else None)


def prepare(extras: tuple[str, ...], chosen: Options) -> None:
    """Makes the environment fit to run the project with ``extras``, or exits saying what is missing and the cure."""
    with _alone():
        gpu = _machine.has_gpu()
        stamp = Stamp.read(chosen.venv)
        base = _digest(sys.executable, sys.version, str(ROOT), str(gpu))
        digest = _digest((ROOT / "pyproject.toml").read_text(encoding="utf-8"), _constraints_text())
        usable = stamp if stamp and stamp.base == base and chosen.python.exists() else None
        if usable and usable.digest == digest and set(extras) <= set(usable.extras):
            print(f"set-up: {chosen.venv} is up to date", flush=True)
            return
        machine = Machine(gpu, _machine.borrowable() if gpu else {})
        _check(machine, chosen, known=stamp is not None)
        usable = usable if usable and usable.borrowed == bool(machine.borrowed) else None
        print(_announcement(machine, chosen, renewed=usable is not None), flush=True)
        fresh = Stamp(base, "", (), bool(machine.borrowed))
        if usable is None:
            _create(chosen, machine, fresh)
        elif usable.digest == digest:
            extras = tuple(sorted({*extras, *usable.extras}))
        _install(extras, machine, chosen)
        replace(fresh, digest=digest, extras=extras).write(chosen.venv)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Holds the project's folder, so that two commands started together make one environment, one after the other."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another command that is setting up", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _constraints_text() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


def _check(machine: Machine, chosen: Options, *, known: bool) -> None:
    """Exits, naming every missing thing with its cure; what only a GPU needs is a note elsewhere."""
    faults = list(_machine.faults(chosen.venv, 0.5 if known else _gigabytes(machine)[1]))
    if not known and chosen.venv.exists() and any(chosen.venv.iterdir()):
        faults.append(f"{chosen.venv} was not made by this command: move it away, or name another with --venv DIR")
    compiler = _machine.compiler_fault()
    if compiler and machine.gpu:
        faults.append(compiler)
    elif compiler:
        print(f"set-up: note: {compiler} (needed on a GPU only)")
    if faults:
        raise SystemExit("set-up cannot start:\n" + "\n".join(f"  * {fault}" for fault in faults))


def _gigabytes(machine: Machine) -> tuple[float, float]:
    """Returns (to download, needed on disk) in GB."""
    return BORROWED_GIGABYTES if machine.borrowed else CUDA_GIGABYTES if machine.gpu else CPU_GIGABYTES


def _announcement(machine: Machine, chosen: Options, *, renewed: bool) -> str:
    """Returns the sentence that says what is about to be fetched."""
    download = _gigabytes(machine)[0]
    size = f"about {download:g} GB are downloaded"
    if chosen.wheels:
        megabytes = sum(wheel.stat().st_size for wheel in chosen.wheels.glob("*.whl")) / 1e6
        size = f"nothing is downloaded, up to {megabytes:.0f} MB of wheels are read from {chosen.wheels}"
    elif renewed:
        size = "it exists, only what it lacks is downloaded"
    elif not machine.gpu:
        size += f" ({CUDA_GIGABYTES[0]:g} GB where pip's index has no CPU build of torch)"
    borrowed = ""
    if machine.borrowed:
        borrowed = f"torch {machine.borrowed['torch']} is borrowed from {sys.executable}; "
    return f"set-up: {chosen.venv}: {borrowed}{size}"


def _create(chosen: Options, machine: Machine, fresh: Stamp) -> None:
    """Makes an empty environment; one that borrows also sees what the running Python sees, itself in a venv or not.

    The stamp goes in first: what is left of an interrupted set-up is known as ours, and replaced.
    """
    if chosen.venv.exists():
        shutil.rmtree(chosen.venv)
    chosen.venv.mkdir(parents=True)
    fresh.write(chosen.venv)
    flags = ["--system-site-packages"] if machine.borrowed else []
    # Python 3.11's ensurepip would put an old setuptools before the borrowed one.
    flags += ["--without-pip"] if (machine.borrowed and _machine.has("pip")) or not _machine.has("ensurepip") else []
    _run([sys.executable, "-m", "venv", *flags, str(chosen.venv)])
    if machine.borrowed and sys.prefix != sys.base_prefix:
        # --system-site-packages reaches the base Python only, never the venv that started us.
        paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        lines = [f"import site; site.addsitedir({path!r})" for path in paths]
        site_packages = next((chosen.venv / "lib").glob("python3*/site-packages"))
        (site_packages / "flashbias_borrowed.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _install(extras: tuple[str, ...], machine: Machine, chosen: Options) -> None:
    """Installs torch and the build backend, then the project itself, editable, with ``extras``."""
    project = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    _pip(["torch", "setuptools>=77.0.3"], _constraints(machine, chosen), chosen)
    own = _own_triton(chosen)
    # The backend is there by now, in the pinned version: no second copy is fetched for the build.
    _pip(["--no-build-isolation", "--editable", project], _constraints(machine, chosen, own), chosen)


def _constraints(machine: Machine, chosen: Options, dropped: frozenset[str] = frozenset()) -> str:
    """Returns constraints.txt without the pins that cannot hold here; offline, the wheels given are the choice."""
    keep = set(machine.borrowed) - {"numpy"}
    if machine.borrowed and chosen.wheels and not list(chosen.wheels.glob("numpy-*.whl")):
        keep.add("numpy")
    pins = GPU_PINS if machine.gpu and not machine.borrowed else {}
    lines = []
    for line in _constraints_text().splitlines():
        pin = line.partition("#")[0].strip()
        name = _machine.normal(re.split(r"[<>=!~ ]", pin, maxsplit=1)[0])
        chosen_elsewhere = chosen.wheels is not None and "==" in pin
        if pin and not chosen_elsewhere and name not in keep | dropped:
            lines.append(pins.get(name, pin))
    return "\n".join(lines) + "\n"


def _own_triton(chosen: Options) -> frozenset[str]:
    """Returns {"triton"} if the torch in the environment names its own Triton (CPU builds name none)."""
    code = "import importlib.metadata as m; print(any(r.startswith('triton') for r in m.requires('torch') or ()))"
    named = subprocess.run([chosen.python, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    return frozenset({"triton"}) if named.strip() == "True" else frozenset()


def _pip(arguments: list[str], constraints: str, chosen: Options) -> None:
    """Runs pip for the environment, under pip's own configuration; offline it sees the wheels only."""
    in_venv = [str(chosen.python), "-m", "pip"]
    works = subprocess.run([*in_venv, "--version"], capture_output=True, check=False).returncode == 0
    pip = in_venv if works else [sys.executable, "-m", "pip", "--python", str(chosen.python)]
    offline = ["--no-index", "--find-links", str(chosen.wheels)] if chosen.wheels else []
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(constraints)
        file.flush()
        # Python compiles what is imported; pip would all 11,000 modules, for half a minute.
        _run([*pip, "install", "--no-compile", *quiet, *offline, "--constraint", file.name, *arguments])


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(command, check=False, env=environment)
    if done.returncode:
        raise SystemExit(
            f"set-up failed (exit status {done.returncode}): {shlex.join(command)}\nIts own words stand above."
        )
