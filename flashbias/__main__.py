"""``python -m flashbias``: the command ``flashbias``."""

from flashbias.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
