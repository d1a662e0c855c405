"""flashbias.settings: environment variables, the context manager, and who hears the log."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import flashbias
from autotune.errors import SettingsError
from autotune.job import Job
from autotune.settings import Mode, Settings
from flashbias.settings import CURE, REMEDY, current, read, reread, settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_environment() -> Iterator[None]:
    """Reads the environment anew for each test."""
    reread()
    yield
    reread()


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh Python with extra environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    """With nothing set: tune, the XDG cache, 60 seconds, no waiting, every implementation, log level info."""
    found = read({"XDG_CACHE_HOME": str(tmp_path)})
    assert found == Settings(cache_dir=tmp_path / "flashbias", group_wait_seconds=120.0, cure=CURE, remedy=REMEDY)
    assert (found.mode, found.budget_seconds, found.wait_seconds, found.log) == (Mode.TUNE, 60.0, 0.0, "info")


def test_every_variable_reaches_its_setting(tmp_path: Path) -> None:
    """Each variable of the table sets its own field."""
    found = read(
        {
            "FLASHBIAS_MODE": "assert",
            "FLASHBIAS_CACHE_DIR": str(tmp_path),
            "FLASHBIAS_BUDGET_SECONDS": "12.5",
            "FLASHBIAS_WAIT_SECONDS": "7",
            "FLASHBIAS_IMPLEMENTATIONS": "triton, triton",
            "FLASHBIAS_LOG": "debug",
        }
    )
    assert found == Settings(Mode.ASSERT, tmp_path, 12.5, 7.0, ("triton",), "debug", cure=CURE, remedy=REMEDY)


def test_empty_variable_counts_as_unset() -> None:
    """A variable set to nothing leaves the default."""
    assert read({"FLASHBIAS_MODE": "", "FLASHBIAS_BUDGET_SECONDS": " "}).mode is Mode.TUNE


@pytest.mark.parametrize(("ranks", "seconds"), [("", 0.0), ("1", 0.0), ("8", 120.0), ("many", 0.0)])
def test_ranks_of_a_job_wait_for_each_other(ranks: str, seconds: float) -> None:
    """With WORLD_SIZE above one the default is to wait for another process's sweep."""
    assert read({"WORLD_SIZE": ranks}).wait_seconds == seconds


def test_relative_xdg_folder_is_ignored_as_the_standard_says() -> None:
    """XDG_CACHE_HOME must be absolute; otherwise the home folder's .cache is used."""
    assert read({"XDG_CACHE_HOME": "relative"}).cache_dir == Path.home() / ".cache" / "flashbias"


def test_cache_folder_may_begin_with_a_tilde_and_becomes_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later change of directory does not move the database."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert read({"FLASHBIAS_CACHE_DIR": "~/tuned"}).cache_dir == Path("/somewhere/tuned")
    assert read({"FLASHBIAS_CACHE_DIR": "here"}).cache_dir == Path.cwd() / "here"


def test_home_of_nobody_costs_a_warning_not_a_call(caplog: pytest.LogCaptureFixture) -> None:
    """A cache folder that cannot be named leaves the results in memory, with one warning that says so."""
    assert read({"FLASHBIAS_CACHE_DIR": "~nobody-of-this-name/x"}).cache_dir is None
    (message,) = caplog.messages
    for part in ("FLASHBIAS_CACHE_DIR", "'~nobody-of-this-name/x'", "kept in memory"):
        assert part in message


def test_home_of_nobody_in_code_is_an_error_where_it_is_written() -> None:
    """What a program passes can be mended by its author."""
    with pytest.raises(SettingsError, match=r"cache_dir: expected a folder, got '~nobody-of-this-name/x'"):
        settings(cache_dir="~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FLASHBIAS_MODE", "fast", "tune, read, assert, retune, off"),
        ("FLASHBIAS_LOG", "loud", "quiet, info, debug"),
        ("FLASHBIAS_BUDGET_SECONDS", "a minute", "a number of seconds"),
        ("FLASHBIAS_BUDGET_SECONDS", "0", "above 0"),
        ("FLASHBIAS_WAIT_SECONDS", "-1", "0 or more"),
        ("FLASHBIAS_IMPLEMENTATIONS", "triton,tritton", "triton"),
    ],
)
def test_wrong_value_names_the_variable_and_the_right_values(variable: str, value: str, expected: str) -> None:
    """A wrong value is an error that says which variable, what was expected and what came."""
    with pytest.raises(SettingsError, match=variable) as caught:
        read({variable: value})
    assert expected in str(caught.value)
    assert repr(value.rsplit(",", maxsplit=1)[-1].removesuffix("seconds")) in str(caught.value) or value in str(
        caught.value
    )


def test_misspelt_variable_is_warned_about_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    """An unknown FLASHBIAS_* name never passes in silence."""
    read({"FLASHBIAS_MODES": "read", "OTHER_MODE": "x"})
    assert len(caplog.messages) == 1
    assert "FLASHBIAS_MODES" in caplog.text
    assert "did you mean FLASHBIAS_MODE?" in caplog.text


def test_unknown_variable_unlike_any_other_gets_the_list(caplog: pytest.LogCaptureFixture) -> None:
    """Without a near name the warning lists the variables there are."""
    read({"FLASHBIAS_XYZZY": "1"})
    assert "FLASHBIAS_CACHE_DIR" in caplog.text


def test_a_job_is_read_from_the_launcher_or_named_by_the_user(tmp_path: Path) -> None:
    """FLASHBIAS_JOB puts a process into a job, or with "none" out of any; a job's processes wait for each other."""
    named = read({"FLASHBIAS_JOB": "mine"})
    assert (named.job, named.alone, named.wait_seconds) == (Job("mine", one_host=True), False, 120.0)
    assert read({}).group_wait_seconds == 120.0, "a process group may show the job later"
    with settings(wait_seconds=5.0) as inside:
        assert (inside.wait_seconds, inside.group_wait_seconds) == (5.0, None)
    left = read({"FLASHBIAS_JOB": "none", "WORLD_SIZE": "8"})
    assert (left.job, left.alone, left.wait_seconds) == (None, True, 0.0)
    assert read({"FLASHBIAS_JOB": "mine", "FLASHBIAS_WAIT_SECONDS": "3"}).wait_seconds == 3.0


def test_record_is_a_toml_file(tmp_path: Path) -> None:
    """FLASHBIAS_RECORD names a file as prewarm reads it; any other ending is an error that says so."""
    assert read({"FLASHBIAS_RECORD": str(tmp_path / "shapes.toml")}).record == tmp_path / "shapes.toml"
    with pytest.raises(SettingsError, match=r"FLASHBIAS_RECORD: record: expected a file that ends in \.toml"):
        read({"FLASHBIAS_RECORD": "shapes.json"})


def test_address_of_a_shared_database_is_kept_and_not_shown() -> None:
    """The variable and the argument mean the same; no repr of the settings shows the password."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    text = "postgresql+psycopg://me:s3cret@host/tuning"
    found = read({"FLASHBIAS_DB_URL": text, "FLASHBIAS_DB_SECONDS": "4"})
    with settings(db_url=text, db_seconds=4.0) as inside:
        assert (inside.db_url, inside.db_seconds) == (found.db_url, found.db_seconds)
        assert inside.identity != replace(inside, db_url=None).identity
    assert found.db_url is not None
    assert found.db_url.url == text
    assert "s3cret" not in f"{found!r} {found.identity!r} {found.db_url}"
    assert "me@host/tuning" in repr(found)


def test_wrong_address_is_an_error_that_does_not_repeat_it() -> None:
    """A malformed address says what one looks like, and keeps to itself what may be a password."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    secret = "s3cr" + "et"  # a traceback quotes this file
    with pytest.raises(SettingsError, match=r"FLASHBIAS_DB_URL: db_url: expected postgresql\+psycopg://") as caught:
        read({"FLASHBIAS_DB_URL": f"postgresql://me:{secret}/tuning"})
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_environment_is_read_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable set after import counts, one changed after the first call does not."""
    monkeypatch.setenv("FLASHBIAS_MODE", "read")
    assert current().mode is Mode.READ
    monkeypatch.setenv("FLASHBIAS_MODE", "off")
    assert current().mode is Mode.READ


def test_block_changes_only_what_it_names_and_only_inside() -> None:
    """Nested blocks add up, and each is undone at its end, also by an exception."""
    outside = current()
    with settings(mode="read"), settings(budget_seconds=5) as inner:
        assert inner is current()
        assert (inner.mode, inner.budget_seconds, inner.cache_dir) == (Mode.READ, 5, outside.cache_dir)
    with pytest.raises(KeyError), settings(mode=Mode.OFF):
        raise KeyError
    assert current() == outside


def test_block_holds_in_its_own_thread_only() -> None:
    """Another thread keeps its own settings."""
    seen: list[Mode] = []
    with settings(mode="off"):
        thread = threading.Thread(target=lambda: seen.append(current().mode))
        thread.start()
        thread.join()
        assert current().mode is Mode.OFF
    assert seen == [Mode.TUNE]


def test_block_holds_in_tasks_started_inside() -> None:
    """Asyncio tasks inherit the settings of the block they were made in, and do not leak theirs."""

    async def inner() -> Mode:
        with settings(budget_seconds=1):
            await asyncio.sleep(0)
            return current().mode

    async def outer() -> Mode:
        with settings(mode="read"):
            task = asyncio.create_task(inner())
        assert current().mode is Mode.TUNE
        return await task

    assert asyncio.run(outer()) is Mode.READ


def test_unknown_setting_names_the_nearest() -> None:
    """A misspelt keyword is an error before the block is entered."""
    with pytest.raises(SettingsError, match=r"'modus'.*did you mean mode\?"):
        settings(modus="read")  # type: ignore[call-arg]


def test_space_is_a_setting_of_code_alone() -> None:
    """It holds inside its block, is refused where it is written if it is no name, and no variable sets it."""
    with settings(space="mine:configs") as inside:
        assert inside.space == "mine:configs"
    assert current().space is None
    assert read({"FLASHBIAS_SPACE": "mine:configs"}).space is None
    with pytest.raises(SettingsError, match=r"space: expected module:attribute, got 'mine\.py'"):
        settings(space="mine.py")


def test_wrong_setting_is_refused_before_the_block() -> None:
    """A wrong value raises where it is written, not inside the block."""
    with pytest.raises(SettingsError, match="expected one of tune, read"):
        settings(mode="fast")


def test_package_attribute_is_callable_before_and_after_the_module_is_imported() -> None:
    """``flashbias.settings(...)`` works whether the name means the function or the module."""
    with flashbias.settings(mode="off") as inside:
        assert inside.mode is Mode.OFF
    with sys.modules["flashbias.settings"](mode="read") as inside:  # type: ignore[operator]
        assert inside.mode is Mode.READ


LOUD = "import logging, flashbias.settings as s; s.current(); logging.getLogger('autotune.x').info('tuning now')"


def test_log_goes_to_stderr_when_the_application_has_no_logging() -> None:
    """An info line of any of our packages is seen on stderr by default, and never on stdout."""
    done = run(LOUD)
    assert done.stderr.strip() == "autotune.x: tuning now"
    assert done.stdout == ""


def test_log_survives_a_stderr_that_is_closed_or_missing() -> None:
    """Nobody hears a line written while there is no stderr; no line raises, and the next stderr is written to again."""
    lines = [
        "import io, logging, sys, flashbias.settings as s",
        "s.current(); say = logging.getLogger('autotune.x').info",
        "sys.stderr = io.StringIO(); say('elsewhere'); sys.stderr.close(); say('closed')",
        "sys.stderr = None; say('missing')",
        "sys.stderr = sys.__stderr__; say('heard')",
    ]
    assert run("\n".join(lines)).stderr.strip() == "autotune.x: heard"


def test_quiet_log_shows_warnings_only() -> None:
    """FLASHBIAS_LOG=quiet drops info lines and keeps warnings."""
    done = run(LOUD + "; logging.getLogger('cache_db').warning('damaged')", FLASHBIAS_LOG="quiet")
    assert done.stderr.strip() == "cache_db: damaged"


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_logging_of_the_application_is_left_alone(before: bool) -> None:
    """An application that configures logging, before or after our first call, gets each record once, its own way."""
    configure = "logging.basicConfig(format='app %(message)s', level=logging.INFO)"
    lines = ["import logging, flashbias.settings as s", configure, "s.current()"]
    order = lines if before else [lines[0], lines[2], lines[1]]
    done = run("\n".join([*order, "logging.getLogger('flashbias').info('hello')"]))
    assert done.stderr.strip() == "app hello"


def test_log_setting_of_a_block_ends_with_it() -> None:
    """``settings(log=...)`` changes our loggers' level for the block."""
    logger = logging.getLogger("flashbias")
    before = logger.level
    with settings(log="debug"):
        assert logger.level == logging.DEBUG
    assert logger.level == before
