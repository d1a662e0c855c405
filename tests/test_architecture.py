"""The house rules that no linter knows: who imports whom, who reads the environment, what shadows us."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cache_db", "autotune", "flashbias")
FORBIDDEN = {
    "cache_db": {"torch", "triton", "autotune", "flashbias", "scripts"},
    "autotune": {"flashbias", "scripts"},
    "flashbias": {"scripts"},
}


def sources(package: str) -> list[Path]:
    """Returns the package's modules; a package without any would make every promise below empty."""
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no modules in {package}"
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the top-level name of everything ``tree`` imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def python(code: str, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter that finds the packages after its working directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    """No module imports a package that stands above its own."""
    for path in sources(package):
        wrong = FORBIDDEN[package].intersection(imported(ast.parse(path.read_text(encoding="utf-8"))))
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_database_package_loads_without_torch(tmp_path: Path) -> None:
    """A tool that only reads the database pays for neither torch nor Triton."""
    code = "import sys, cache_db, cache_db.models; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    assert python(code, tmp_path).returncode == 0


def test_one_module_reads_the_environment() -> None:
    """FLASHBIAS_* is read in flashbias/settings.py and nowhere else."""
    for path in (path for package in PACKAGES for path in sources(package)):
        names = [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"FLASHBIAS_[A-Z_]*", node.value)
        ]
        assert not names or path == ROOT / "flashbias" / "settings.py", f"{path.relative_to(ROOT)} names {names}"


def test_kernels_avoid_what_triton_removed() -> None:
    """Block pointers are gone from Triton's main branch, so no kernel uses them."""
    for path in sources("flashbias"):
        assert not re.search(r"make_block_ptr|tl\.advance", path.read_text(encoding="utf-8")), path


def test_nothing_names_a_package_index() -> None:
    """Where packages come from is the business of the user's pip configuration."""
    files = [*(ROOT / "scripts").iterdir(), ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / ".ci" / "run"]
    for path in filter(Path.is_file, files):
        named = re.search(r"index-url|pypi\.|download\.pytorch", path.read_text(encoding="utf-8"))
        assert named is None, f"{path.relative_to(ROOT)} names {named}"


@pytest.mark.parametrize("name", ["autotune", "cache_db"])
@pytest.mark.parametrize("form", ["module", "package"])
def test_a_shadowing_module_is_named_with_its_cure(tmp_path: Path, name: str, form: str) -> None:
    """A user's own autotune.py in the working directory stops the import with its path and the way out."""
    culprit = tmp_path / f"{name}.py" if form == "module" else tmp_path / name / "__init__.py"
    culprit.parent.mkdir(exist_ok=True)
    culprit.touch()
    done = python("import flashbias", tmp_path)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert str(culprit.resolve()) in done.stderr
    assert "-P" in done.stderr


def test_an_imported_namesake_is_noticed_too(tmp_path: Path) -> None:
    """The check looks at what was imported already, not only at what would be."""
    (tmp_path / "autotune.py").touch()
    done = python("import autotune, sys; sys.path.pop(0); import flashbias", tmp_path)
    assert done.returncode == 1
    assert str(tmp_path.resolve() / "autotune.py") in done.stderr


def test_the_cure_for_shadowing_works(tmp_path: Path) -> None:
    """With -P the namesake in the working directory does no harm."""
    (tmp_path / "autotune.py").write_text("raise RuntimeError('the wrong one')\n", encoding="utf-8")
    done = python("import flashbias; print(flashbias.__version__)", tmp_path, "-P")
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_cost_nothing_before_use(tmp_path: Path) -> None:
    """``import flashbias`` loads no torch; every name in ``__all__`` then imports, and any other is an AttributeError."""
    code = (
        "import sys, flashbias; assert 'torch' not in sys.modules; from flashbias import *\n"
        "assert set(flashbias.__all__) <= set(globals()) and not hasattr(flashbias, 'other')"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
