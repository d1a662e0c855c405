"""Whether Triton could build its launchers here: a C compiler, and Python's headers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

SECONDS: Final = 60.0
_PYTHON: Final = f"{sys.version_info[0]}.{sys.version_info[1]}"


def compiler() -> str | None:
    """Returns the C compiler that Triton would use: the one that CC names, else gcc, clang or cc on the path."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


def headers() -> Path | None:
    """Returns the folder of the running Python's headers, None where they are missing."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").exists() else None


def fault() -> tuple[str, str] | None:
    """Returns what keeps a launcher from being built, and the cure; None if one line compiles against ``Python.h``."""
    chosen, include = compiler(), headers()
    if not chosen:
        return "there is no C compiler", "apt install gcc, or name one in CC"
    if include is None:
        missing = Path(sysconfig.get_path("include"), "Python.h")
        return f"Python's headers are missing ({missing})", f"apt install python{_PYTHON}-dev"
    command = [*shlex.split(chosen), "-x", "c", "-fsyntax-only", "-I", str(include), "-"]
    try:
        subprocess.run(
            command, input="#include <Python.h>\n", text=True, capture_output=True, timeout=SECONDS, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or ["it said nothing"]
        return (
            f"{chosen} cannot compile against Python.h: {said[0]}",
            "apt install gcc libc6-dev, or name another in CC",
        )
    return None
