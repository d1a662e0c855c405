#!/usr/bin/env python3
"""Tunes attention shapes before they are needed: ``scripts/prewarm.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from flashbias.cli.prewarm import main
except ModuleNotFoundError as missing:
    raise SystemExit(f"prewarm: {missing}; run it with .venv/bin/python, which scripts/quickstart makes") from missing

if __name__ == "__main__":
    raise SystemExit(main())
