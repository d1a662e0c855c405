"""The README and the pages it links to stay true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import Warm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_each_example_runs(code: str, tmp_path: Path) -> None:
    """What a reader copies out of a page runs as it stands, in a process of its own without the interpreter."""
    status, _, errors = Warm(code, [], {**os.environ, "TRITON_INTERPRET": ""}, tmp_path).finish()
    assert status == 0, errors


def test_an_example_runs_in_a_plain_python(tmp_path: Path) -> None:
    """The first one of the README, in a Python that has imported nothing yet."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": ""}
    command = [sys.executable, "-c", str(EXAMPLES[0].values[0])]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page: Path) -> None:
    """A relative link on a page names a file of this project."""
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_settings_page_lists_every_variable() -> None:
    """The table of environment variables names exactly those that are read."""
    from flashbias.settings import _VARIABLES

    listed = re.findall(
        r"^\| `(FLASHBIAS_\w+)`", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(_VARIABLES)


def test_the_readme_stays_short() -> None:
    """A reader gets through the README: under 150 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
