"""What ``pip install`` would put on a user's machine, seen in a real wheel."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import flashbias

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("autotune", "cache_db", "flashbias")
FILES = ("CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "mkdocs.yml")
EXTRAS = {"bench", "cli", "dev", "docs", "postgres", "test", "transformers"}


def files(folder: str) -> set[str]:
    """Returns the files of the project's ``folder``, as paths below the project, but what Python or an editor leaves."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the source distribution from a copy, so that the project's folder stays clean, and returns it."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__")
    for folder in (*PACKAGES, "docs", "scripts", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for name in (*FILES, "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(target)], cwd=copy, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    (built,) = target.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from the source distribution alone, as an installer would, without an index."""
    target = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([sys.executable, *build, "--wheel-dir", str(target), str(source)], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the wheel into a fresh environment, which sees this one's packages behind its own; returns its folder."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, symlinks=True)
    (own,) = home.glob("lib/python*/site-packages")
    install = ["--quiet", "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), *install], check=True)
    (own / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return home


def ask(home: Path, folder: Path, *command: str) -> str:
    """Returns what a program of the environment at ``home`` prints in another folder, under the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "FLASHBIAS_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    path = [str(home / "bin" / command[0]), *command[1:]]
    done = subprocess.run(path, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_source_distribution_is_whole(source: Path) -> None:
    """Who has only it can read the pages and run the tests: everything that is there is in it, and nothing compiled."""
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (*PACKAGES, "docs", "scripts", "tests")
    assert {path for folder in folders for path in files(folder)} | set(FILES) <= names
    assert not [name for name in names if name.endswith((".pyc", "__pycache__"))]


def test_the_wheel_holds_exactly_three_packages(wheel: Path) -> None:
    """Nothing but autotune, cache_db and flashbias lands at the top level of site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_file_and_the_licence(wheel: Path) -> None:
    """Each file of the packages (modules, py.typed, data) and the licence are in the wheel."""
    wanted = {path for package in PACKAGES for path in files(package)}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= wanted <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Name, version, Python and extras in the metadata are those the project promises."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "flashbias"
    assert metadata["Version"] == flashbias.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_an_index_would_take_both(source: Path, wheel: Path) -> None:
    """``twine check --strict`` finds no fault with metadata or description."""
    pytest.importorskip("twine", reason="the extra dev is not installed")
    check = [sys.executable, "-W", "ignore", "-m", "twine", "check", "--strict", str(source), str(wheel)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_installed_command_works(installed: Path, tmp_path: Path) -> None:
    """``flashbias`` is on the environment's path, finds its packages there, and tells of the machine."""
    assert "explain" in ask(installed, tmp_path, "flashbias", "--help")
    assert f"flashbias={flashbias.__version__}" in ask(installed, tmp_path, "flashbias", "env")


def test_the_installed_library_runs_a_kernel(installed: Path, tmp_path: Path) -> None:
    """A call from any folder proves and launches a kernel of the installed files, in the interpreter, and is right."""
    code = f"""
import flashbias, torch
assert flashbias.__file__.startswith({str(installed)!r}), flashbias.__file__
q, k, v = torch.randn(3, 1, 20, 1, 16, dtype=torch.float16)
with flashbias.settings(mode="read", log="quiet"):
    out = flashbias.flash_bias_func(q, k, v)
    rung = flashbias.explain(q, k, v).rung
wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
torch.testing.assert_close(out, wanted, atol=2e-3, rtol=2e-3)
print(rung)
"""
    assert ask(installed, tmp_path, "python", "-P", "-c", code).strip() == "default"


def test_the_changelog_knows_this_version() -> None:
    """Every version that can be built has its section in the changelog."""
    assert f"## [{flashbias.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
