"""What ``pip install`` would put on a user's machine, seen in a real wheel."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashbias

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("autotune", "cache_db", "flashbias")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy, so that the project's folder stays clean, without an index."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([sys.executable, *build, "--wheel-dir", str(target), str(source)], check=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_exactly_three_packages(wheel: Path) -> None:
    """Nothing but autotune, cache_db and flashbias lands at the top level of site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_module_its_types_and_the_licence(wheel: Path) -> None:
    """Each module of the tree, each py.typed and the licence are in the wheel."""
    wanted = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    wanted |= {f"{package}/py.typed" for package in PACKAGES}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "flashbias/cli/reporting/template").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wanted <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Name, version, Python and extras in the metadata are those the project promises."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "flashbias"
    assert metadata["Version"] == flashbias.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {"bench", "cli", "dev", "postgres", "test", "transformers"}


def test_the_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    """The installed files are complete: the public names import from them and from nowhere else."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import flashbias; flashbias.flash_bias_func; flashbias.settings; print(flashbias.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ask = [sys.executable, "-P", "-c", code]
    done = subprocess.run(ask, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_the_changelog_knows_this_version() -> None:
    """Every version that can be built has its section in the changelog."""
    assert f"## [{flashbias.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
