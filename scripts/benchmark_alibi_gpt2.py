#!/usr/bin/env python3
"""Runs upstream's own benchmark and draws its figures: ``scripts/benchmark_alibi_gpt2.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from flashbias.cli.benchmark import alibi_gpt2
except ModuleNotFoundError as missing:
    raise SystemExit(f"benchmark: {missing}; run it with .venv/bin/python, which scripts/quickstart makes") from missing

if __name__ == "__main__":
    raise SystemExit(alibi_gpt2())
