"""Every command that a page shows is one that works: run here, or where that needs another machine, at least parsed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sqlite3
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashbias.cli import benchmark, matrix, prewarm
from flashbias.cli.main import _parser as flashbias_parser
from flashbias.cli.main import main
from flashbias.cli.shapes import from_file
from flashbias.settings import _VARIABLES
from tests.scripts.command_cases import GOOD, KEY, ROOT, Run

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [(page.name, *found) for page in PAGES for found in FENCE.findall(page.read_text(encoding="utf-8"))]

# What a block may be, and who looks at it. SQL: tests/cache_db/test_server.py grants the same two sets of rights.
LANGUAGES = {"python": "tests/test_docs.py", "sh": "below", "toml": "below", "sql": "a server"}

# Programs that start another: what they start is looked at.
LAUNCHERS = {"torchrun", "srun", "ncu", "nsys"}
PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "scripts/prewarm.py": prewarm._parser,
    "scripts/benchmark.py": benchmark._parser,
    "scripts/benchmark_alibi_gpt2.py": benchmark._settings_parser,
    "scripts/compile_matrix.py": matrix._parser,
}
# What is only parsed, and why.
PARSED = {
    "cache init": "needs a server: tests/cache_db/test_init.py",
    "--params": "attention's parameters, and the database here is of another kernel: test_command_pin.py",
    "--repeats": "takes minutes",
    "ptx": "compiles, which the interpreter cannot: test_command_ptx.py",
}
# 1 is an answer too: the shape is not tuned, the machine has a fault.
ANSWERS = {"explain": {0, 1}, "doctor": {0, 1}}


def commands() -> Iterator[str]:
    """Yields each line of each block of shell commands."""
    for _, language, text in BLOCKS:
        if language == "sh":
            yield from filter(None, map(str.strip, text.splitlines()))


def told(line: str) -> list[str]:
    """Returns the words of ``line`` from our own program on, "" where it starts none; its variables are ones we read."""
    words = shlex.split(line, comments=True)
    while words and (words[0] == "export" or re.match(r"\w+=", words[0])):
        name = words.pop(0).partition("=")[0]
        assert not name.startswith("FLASHBIAS_") or name in _VARIABLES, f"{line}: no such variable"
    if words and words[0] in LAUNCHERS:
        start = next(
            place for place, word in enumerate(words) if word == "flashbias" or word.endswith((".py", "python"))
        )
        words = words[start:]
    return words[1:] if words and words[0] in {"python", ".venv/bin/python"} else words


OURS = sorted({tuple(words) for line in commands() if (words := told(line)) and words[0] == "flashbias"})
OTHERS = sorted({tuple(words) for line in commands() if (words := told(line)) and words[0] != "flashbias"})


def test_every_block_has_somebody_who_looks_at_it() -> None:
    """No page has a block without a language, or in one that no test knows."""
    fences = sum(page.read_text(encoding="utf-8").count("```") for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a block that is indented, or has no end"
    for page, language, text in BLOCKS:
        assert language in LANGUAGES, f"{page}: a block of {language or 'nothing'!r}: {text[:60]}"


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_each_shown_command_of_ours_works(
    words: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hash of a stored key and config for those on the page, and files by the names it gives them."""
    arguments = [{"3f2a": KEY, "91bc": GOOD.hash}.get(word, word) for word in words[1:]]
    if any(f" {part} " in f" {' '.join(arguments)} " for part in PARSED):
        flashbias_parser().parse_args(arguments)
        return
    monkeypatch.chdir(tmp_path)
    Path("shapes.toml").write_text(next(text for _, language, text in BLOCKS if language == "toml"), encoding="utf-8")
    for pack in {"h200.jsonl", "a.jsonl", "b.sqlite"}.intersection(arguments) if "export" not in arguments else ():
        form = Path(pack).suffix.removeprefix(".")
        assert run("cache", "export", "--format", form, "--output", pack)[0] == 0
    if arguments[0] == "unpin":
        assert run("pin", "--key", KEY, "--config", GOOD.hash)[0] == 0
    if "merge" in arguments:  # files alone, no database
        assert main(arguments) == 0
        return
    code, _, errors = run(*arguments)
    assert code in ANSWERS.get(arguments[0], {0}), errors


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_each_other_shown_command_is_there(words: tuple[str, ...], folder: Path) -> None:
    """Scripts take their flags, modules and paths exist, extras are declared, and SQL finds its tables."""
    program, arguments = words[0], list(words[1:])
    if program in PARSERS:
        PARSERS[program]().parse_args(arguments)
    elif program == "-m":
        if arguments[0] == "mkdocs":
            pytest.importorskip("mkdocs", reason="the extra docs is not installed")
        assert importlib.util.find_spec(arguments[0]) is not None
        assert all((ROOT / path).exists() for path in arguments if path.startswith("tests/"))
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert set(re.findall(r"\[(\w+)\]", words[2])) <= set(extras)
    elif program == "sqlite3":
        assert sqlite3.connect(folder / "flashbias.db").execute(arguments[1]).fetchall()
    elif program != "train.py":  # the reader's own
        assert (ROOT / program).is_file()


@pytest.mark.parametrize("text", [text for _, language, text in BLOCKS if language == "toml"])
def test_each_shown_shapes_file_is_read(text: str, tmp_path: Path) -> None:
    """A TOML block is a file of shapes as ``scripts/prewarm.py`` takes it."""
    file = tmp_path / "shapes.toml"
    file.write_text(text, encoding="utf-8")
    assert from_file(file)
