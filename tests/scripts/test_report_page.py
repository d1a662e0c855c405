"""The page of ``flashbias report`` at work: its logic in an engine without a document, and all of it in a real browser.

``flashbias/cli/reporting/template/logic.js`` decides, and knows no document: ``node -e`` runs it with a few lines behind it.
The other scripts only draw; they need a browser, and their tests are skipped where none is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashbias.cli.reporting import page
from tests.scripts.browser import Browser, browser_path
from tests.scripts.report_pages import Elements, pages, write
from tests.scripts.report_rows import HOSTILE, many

TEMPLATE = Path(page.__file__).parent / "template"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small database and one full of attacks, each with its page."""
    return pages(tmp_path_factory.mktemp("report"))


@pytest.mark.skipif(shutil.which("node") is None, reason="no engine for scripts (node) is installed here")
def test_what_the_page_decides(place: Path) -> None:
    """Its logic, which knows no document, filters, sorts and words as it should; run in an engine without a browser."""
    (text,) = (each for each in Elements((place / "usual.html").read_text(encoding="utf-8")).inside[1:2])
    checks = """
    const { problems } = JSON.parse(process.argv[1]);
    const first = problems.find((each) => each.facets.head_dim === "64" && each.facets.gpu.includes("H200"));
    const wanted = (changes) => ({ search: "", kernel: "", state: "", facets: {}, ...changes });
    const count = (changes) => problems.filter((each) => matches(each, wanted(changes))).length;
    const kernel = first.kernels[0];
    const shown = kernel.cells.map((cell) => cellOf(kernel, cell));
    const lost = { ...kernel, configs: kernel.configs.map((each, number) => (number === kernel.winner.config ? { ...each, state: "racy" } : each)) };
    console.log(JSON.stringify({
      counts: [{}, { search: "head_dim=64 h200" }, { search: "NOT PROVEN" }, { kernel: "backward_dq" }, { facets: { causal: "no" } },
        { state: "no winner" }, { state: "pinned" }, { search: first.kernels[1].key }, { search: "nothing of it" }].map(count),
      cells: shown.map((each) => [each.kind, each.text, each.under, each.bad, each.winner]),
      label: cellLabel(kernel.cells[0], shown[0]),
      lost: cellLabel(kernel.cells[0], cellOf(lost, kernel.cells[0])),
      failures: failures(kernel).map((row) => [row.state, row.count]),
      steps: [1, 1.1, 1.9, 50].map((ms) => step(1, ms)),
      times: [0.00512, 0.0999, 0.1, 1.25, 123.4, null].map(milliseconds),
      durations: [0.44, 61, 130, 9000].map(duration),
      second: [secondText({ behind: 0.024 }), secondText({ behind: null })],
      slowest: ordered(problems, "slowest first").map((each) => each.ms),
      numbers: values(problems, (each) => [each.facets.head_dim]),
    }));
    """
    script = (TEMPLATE / "logic.js").read_text(encoding="utf-8") + checks
    done = subprocess.run(["node", "-e", script, text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "counts": [3, 1, 2, 1, 1, 1, 1, 1, 0],
        "cells": [
            ["step-0", "1.00 ms", "1.00×", 1, True],
            ["step-2", "1.25 ms", "1.25×", 0, False],
            ["failed", "resources", "", 1, False],
            ["unproven", "3.00 ms", "timed only", 0, False],
        ],
        "label": "64 by 64, 4 warps: 1.00 ms, 1.00 times the fastest, the winner, 1 of 2 unsafe",
        "lost": "64 by 64, 4 warps: racy, the winner, which failed since, 2 of 2 unsafe",
        "failures": [["wrong", 1], ["out_of_resources", 1]],
        "steps": [0, 1, 4, 5],
        "times": ["5.12 µs", "99.9 µs", "0.100 ms", "1.25 ms", "123 ms", "–"],
        "durations": ["0.4 s", "61 s", "2 min", "2.5 h"],
        "second": ["2.4 % slower", "no other safe config has a time"],
        "slowest": [2.0, 1.0, None],
        "numbers": ["64", "128"],
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser, or a skip where none is installed."""
    path = browser_path()
    if path is None:
        pytest.skip("no Chromium is installed here (chromium, chromium-browser or google-chrome)")
    with Browser(path) as found:
        yield found


def opened(browser: Browser, file: Path) -> None:
    """Opens ``file`` and waits until every open card is drawn; nothing may have failed or been asked for."""
    browser.events.clear()
    browser.open(file)
    browser.ask(
        "(async () => { while ([...document.querySelectorAll('details.problem[open]')].some((card) => card.childElementCount < 2))"
        " await new Promise((done) => setTimeout(done, 10)); })()"
    )
    asked = [each["request"]["url"] for each in browser.named("Network.requestWillBeSent")]
    assert [url.partition("#")[0] for url in asked] == [file.resolve().as_uri()]
    assert not browser.named("Runtime.exceptionThrown")
    assert not browser.named("Log.entryAdded")


class TestInABrowser:
    """The page in a real browser, without a window."""

    def test_each_key_has_its_map_with_winner_and_failures(self, browser: Browser, place: Path) -> None:
        """Cells show times and verdicts, the winner is marked, and foreign implementations have rows of their own."""
        opened(browser, place / "usual.html")
        assert browser.ask("document.title") == "FlashBias tuning report"
        assert browser.ask("document.querySelectorAll('section.kernel').length") == 4
        assert browser.ask("document.querySelectorAll('.heat .winner').length") == 3
        assert (
            browser.ask("[...document.querySelectorAll('.heat .failed .time')].map((each) => each.textContent)").count(
                "resources"
            )
            == 3
        )
        assert browser.ask("document.querySelector('.others').textContent").startswith(
            "Implementations without these tilessdpa/flash"
        )

    def test_pointer_and_keys_tell_why(self, browser: Browser, place: Path) -> None:
        """Hovering shows what a cell folds, with reasons; arrows move through the map, Escape puts the tip away."""
        opened(browser, place / "usual.html")
        browser.point(".heat .mixed:not(.failed) button")
        assert "it is wrong" in browser.ask("document.getElementById('tip').innerText")
        browser.ask("document.querySelector('.heat td.winner button').focus()")
        before = browser.ask("document.activeElement.getAttribute('aria-label')")
        browser.press("ArrowDown")
        after = browser.ask("document.activeElement.getAttribute('aria-label')")
        assert before.startswith("64 by 64, 4 warps: 1.00 ms")
        assert after == "128 by 64, 4 warps: 1.25 ms, 1.25 times the fastest"
        assert browser.ask("document.activeElement.getAttribute('aria-describedby')") == "tip"
        browser.press("ArrowRight")
        assert browser.ask("document.activeElement.getAttribute('aria-label')").startswith("128 by 128, 8 warps")
        assert browser.ask("document.querySelectorAll('.heat')[0].querySelectorAll('[tabindex=\"0\"]').length") <= 1
        browser.press("Escape")
        assert browser.ask("document.getElementById('tip').hidden")

    def test_filters_leave_what_they_name(self, browser: Browser, place: Path) -> None:
        """Words and choices narrow the list, a kernel hides the others, and Clear brings all back."""
        opened(browser, place / "usual.html")
        choose = (
            "((name, value) => { const found = document.getElementById(name) || document.querySelector(`[name=${name}]`); found.value = value;"
            "found.dispatchEvent(new Event('input', {bubbles: true})); return document.getElementById('count').textContent; })"
        )
        assert browser.ask(f"{choose}('search', 'it is crashed')") == "1 of 3 problems"
        assert browser.ask(f"{choose}('search', '')") == "3 of 3 problems"
        assert browser.ask(f"{choose}('gpu', 'NVIDIA H200')") == "2 of 3 problems"
        assert browser.ask(f"{choose}('kernel', 'backward_dq')") == "1 of 3 problems"
        shown = "[...document.querySelectorAll('details.problem:not([hidden]) section.kernel:not([hidden])')].map((each) => each.dataset.kernel)"
        assert browser.ask(shown) == ["backward_dq"]
        browser.ask("document.querySelector('[type=reset]').click(); new Promise((done) => setTimeout(done, 20))")
        assert browser.ask("document.getElementById('count').textContent") == "3 of 3 problems"

    def test_hostile_rows_are_only_text(self, browser: Browser, place: Path) -> None:
        """Nothing a row says runs, becomes an element or keeps the page from showing the rest."""
        opened(browser, place / "hostile.html")
        browser.ask("document.getElementById('open').click(); new Promise((done) => setTimeout(done, 300))")
        browser.ask(
            "for (const each of document.querySelectorAll('details')) { each.open = true; if (each.draw) each.draw(); }"
        )
        assert browser.ask("document.title") == "FlashBias tuning report"
        assert browser.ask("document.querySelectorAll('img, iframe, object, link').length") == 0
        assert browser.ask("document.querySelectorAll('script').length") == 2
        assert browser.ask("document.body.textContent.includes(\"</script><script>document.title='broken'</script>\")")
        assert browser.ask("document.querySelectorAll('section.kernel').length") == len(HOSTILE)

    def test_of_hundreds_of_problems_only_what_is_looked_at_is_drawn(self, browser: Browser, tmp_path: Path) -> None:
        """All cards are there at once and closed; opening all draws those near the window."""
        many(tmp_path / "flashbias.db", 200)
        write(tmp_path, tmp_path / "many.html")
        opened(browser, tmp_path / "many.html")
        drawn = "document.querySelectorAll('section.kernel').length"
        assert browser.ask("document.querySelectorAll('details.problem').length") == 200
        assert browser.ask(drawn) == 0
        browser.ask("document.getElementById('open').click(); new Promise((done) => setTimeout(done, 300))")
        assert 0 < browser.ask(drawn) < 100
