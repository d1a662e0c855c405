"""The one file of ``flashbias report``: template, style, script and data, none of which can break out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from autotune.evidence import plain

_PARTS: Final = ("style.css", "logic.js", "drawing.js", "page.js")
# What ends a script, or begins a comment in one, has to be written with these (https://html.spec.whatwg.org/#restrictions-for-contents-of-script-elements).
_ESCAPES: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def page(data: Mapping[str, Any]) -> str:
    """Returns the page that shows ``data``: HTML that loads nothing, and runs no script but its own.

    The page forbids the browser all else by the hashes of its style and script, so that even text that found its way into
    the markup could neither run nor call anywhere.
    """
    sheet, *scripts = (_part(name) for name in _PARTS)
    # ASCII alone: a stdout of another encoding would change the bytes, and then the hashes forbid the page its own parts.
    style, script = _escaped(sheet, "\\{:06x}"), _escaped("\n".join(scripts), "\\u{:04x}")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    places = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": embedded(data)}
    text = _part("page.html")
    pieces = text.split("%%")  # text, name, text, …: what is filled in is not looked at again
    return "".join(places[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def embedded(data: Mapping[str, Any]) -> str:
    """Returns ``data`` as JSON in ASCII that stays inside its script element, whatever strings it holds."""
    return json.dumps(plain(data), separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _part(name: str) -> str:
    return (resources.files(__package__) / "template" / name).read_text(encoding="utf-8")


def _escaped(text: str, form: str) -> str:
    """Returns ``text`` with each character beyond ASCII, of which strings and comments alone have any, in that ``form``."""
    return re.sub(r"[^\x00-\x7f]", lambda found: form.format(ord(found[0])), text)


def _hash(text: str) -> str:
    """Returns the source expression of an inline element's content (https://www.w3.org/TR/CSP3/#match-element-to-source-list)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
