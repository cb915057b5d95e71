"""Markdown of people and models as HTML that is safe to show: no script, style, form, id, image or link left.

Two walls: markdown-it-py does not pass HTML through (html=False), and nh3 keeps a short list of tags. A link
turns into underlined text with its address as a hint, an image into its source: reading tells nobody.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

LONGEST = 20_000
"""Characters beyond which a text stays plain: rendering is quadratic in what an attacker may choose."""
TAGS = {
    *(
        "p",
        "br",
        "hr",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "strong",
        "em",
        "s",
        "u",
        "code",
        "pre",
        "blockquote",
    ),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"u": {"title"}, "ol": {"start"}}


@lru_cache(maxsize=1024)
def render(text: str) -> str:
    """HTML without active content."""
    if len(text) > LONGEST:
        return f"<pre>{escapeHtml(text)}</pre>"
    return nh3.clean(_parser.render(text), tags=TAGS, attributes=ATTRIBUTES, link_rel=None)


def _link_open(_: object, tokens: Sequence[Token], index: int, *more: Any) -> str:
    return f'<u title="{escapeHtml(str(tokens[index].attrGet("href")))}">'


def _link_close(*_: Any) -> str:
    return "</u>"


def _image(_: object, tokens: Sequence[Token], index: int, *more: Any) -> str:
    token = tokens[index]
    source = token.attrGet("src")
    return f"<code>{escapeHtml(f'![{token.content}]({source})')}</code>"


_parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_parser.add_render_rule("link_open", _link_open)
_parser.add_render_rule("link_close", _link_close)
_parser.add_render_rule("image", _image)
