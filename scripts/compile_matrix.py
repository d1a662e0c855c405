#!/usr/bin/env python3
"""Compiles every candidate for every architecture, without a GPU: ``scripts/compile_matrix.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from flashbias.cli.matrix import main
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"compile_matrix: {missing}; run it with .venv/bin/python, which scripts/quickstart makes"
    ) from missing

if __name__ == "__main__":
    raise SystemExit(main())
