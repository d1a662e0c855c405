"""Command-line doors; ``scripts/`` holds the files that call them."""
