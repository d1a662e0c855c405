#!/usr/bin/env python3
"""Compares the tuned operator with its peers: ``scripts/benchmark.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from flashbias.cli.benchmark import main
except ModuleNotFoundError as missing:
    raise SystemExit(f"benchmark: {missing}; run it with .venv/bin/python, which scripts/quickstart makes") from missing

if __name__ == "__main__":
    raise SystemExit(main())
