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


def headings(page: Path) -> set[str]:
    """Returns the names that a page's headings, and what the API reference documents, can be linked by."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page: Path) -> None:
    """A relative link on a page names a file of this project, and a heading that is there."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not heading or heading in headings(file), target


def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning: every page is in the menu, every link and anchor exists, every documented name too.

    It asks no network for anything: neither now, nor when it is read.
    """
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        fetched = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"((?:https?:)?//[^\"]+)", page.read_text("utf-8"))
        assert not fetched, f"{page.name} fetches {fetched}"


def test_the_reference_documents_every_public_name() -> None:
    """What ``flashbias``, its factors and its layers call public is on the page made from docstrings."""
    import flashbias
    from flashbias import factors, nn

    documented = {name.rpartition(".")[2] for name in headings(ROOT / "docs" / "reference.md") if "." in name}
    modules = {"__version__", "factors", "nn"}
    public = {*flashbias.__all__, *factors.__all__, *nn.__all__} - modules
    assert public <= documented, public - documented


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
