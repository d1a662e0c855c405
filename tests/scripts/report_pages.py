"""Pages that ``flashbias report`` has written, and what a browser would find in them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from flashbias.cli.main import main
from tests.scripts.report_rows import attack, fill


class Elements(HTMLParser):
    """What a browser would see: every tag with its attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes a tag."""
        self.tags.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self.inside.append("")

    def handle_data(self, data: str) -> None:
        """Notes the text of the last script or style."""
        if self.cdata_elem and self.inside:
            self.inside[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """The page's data."""
        found: dict[str, Any] = json.loads(self.inside[1])
        return found


def write(folder: Path, output: Path) -> str:
    """Returns the page of the database in ``folder``."""
    assert main(["report", "--cache-dir", str(folder), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def pages(folder: Path) -> Path:
    """Returns ``folder`` with a small database and one full of attacks, each with its page."""
    for name, make in (("usual", fill), ("hostile", attack)):
        (folder / name).mkdir()
        make(folder / name / "flashbias.db")
        write(folder / name, folder / f"{name}.html")
    return folder
