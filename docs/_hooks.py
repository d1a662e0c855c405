"""What the site's builder does beside ``mkdocs.yml``: colours of code, and docstrings without Sphinx's roles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pygments.formatters import HtmlFormatter

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)")
STYLES = {"light": "friendly", "dark": "github-dark"}


def on_page_content(html: str, **_: Any) -> str:
    """Returns the page without the roles before names: ``:func:`x``` reads as code already."""
    return ROLE.sub("", html)


def on_post_build(config: Any, **_: Any) -> None:
    """Writes the style sheet of highlighted code, for light and dark pages; a theme would fetch one from a network."""
    rules = [
        HtmlFormatter(style=style).get_style_defs(f'[data-bs-theme="{mode}"] .highlight')
        for mode, style in STYLES.items()
    ]
    Path(config.site_dir, "highlight.css").write_text("\n".join(rules) + "\n", encoding="utf-8")
