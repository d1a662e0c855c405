"""Text that commands print: rows may hold anything, and a terminal obeys what it is sent."""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Returns ``text`` with whatever is no printable character as Python writes it, a newline as ``\n``.

    Control characters could recolour, move or retitle the terminal, and a newline could forge a line of the command's.
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def tell(lines: Iterable[str]) -> None:
    """Prints ``lines`` to stdout, each as one line."""
    for line in lines:
        print(printable(line))
