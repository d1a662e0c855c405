#!/usr/bin/env python3
"""Tunes attention shapes before they are needed: ``scripts/prewarm.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashbias.cli.prewarm import main

if __name__ == "__main__":
    raise SystemExit(main())
