"""HTML that cannot be broken into: whatever is not made here is escaped, as text and in attributes."""

from __future__ import annotations

import base64
import html
import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_xai.figures import encode_png

# What HTML forbids, and letters that turn the direction of what follows them on the page.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_EMPTY = {"img", "meta"}
NOT_AVAILABLE = "n/a"


class Html(str):
    """Text that is HTML already; :func:`element` and :func:`joined` make it, and nothing else should."""

    __slots__ = ()


def element(name: str, /, *content: Any, **attributes: Any) -> Html:
    """Return an element; content that is no :class:`Html` is escaped, as attributes always are.

    Args:
        name: of the element.
        content: what is in it, in order.
        attributes: by name; a trailing underscore is dropped (``class_``), None leaves one out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    inside = "".join(f' {key}="{escaped(value)}"' for key, value in given.items() if value is not None)
    if name in _EMPTY:
        return Html(f"<{name}{inside}>")
    return Html(f"<{name}{inside}>{joined(*content)}</{name}>")


def joined(*content: Any) -> Html:
    """Return parts in a row."""
    return Html("".join(part if isinstance(part, Html) else escaped(part) for part in content))


def escaped(value: Any) -> Html:
    """Return anything as text of HTML, with letters replaced that no page may hold."""
    return Html(html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True))


def picture(pixels: NDArray[np.uint8], words: str, scale: float) -> Html:
    """Return pixels as an image within the page.

    Args:
        pixels: RGB, shape (height, width, 3).
        words: what is seen, for those who cannot see it.
        scale: pixels of the image for each pixel of the page.
    """
    data = base64.b64encode(encode_png(pixels)).decode("ascii")
    height, width = pixels.shape[:2]
    source = f"data:image/png;base64,{data}"
    return element("img", src=source, alt=words, width=round(width / scale), height=round(height / scale))


def table(heads: list[Any], rows: list[list[Any]], **attributes: Any) -> Html:
    """Return a table; a cell that is an element of a table already is taken as it is."""
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    body = [element("tr", *(cell if _is_cell(cell) else element("td", cell) for cell in row)) for row in rows]
    inner = joined(element("thead", head), element("tbody", *body))
    return element("div", element("table", inner, **attributes), class_="wide")


def number(value: Any, digits: int = 3) -> str:
    """Return a number in a few digits, or "n/a" where it is not defined."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}", 1) if value < 0 else f"{value:.{digits}g}"


def span(interval: tuple[float, float]) -> str:
    """Return an interval, or "n/a" where an end is not defined."""
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return NOT_AVAILABLE
    return f"[{number(low)}, {number(high)}]"


def plain_words(text: Any) -> str:
    """Return text, on one line, that neither Markdown nor HTML reads as anything else."""
    line = " ".join(str(text).encode("utf-8", "replace").decode().split())
    return re.sub(r"[\\`*_{}\[\]()#+!|~<>&\"'-]", lambda found: f"&#{ord(found[0])};", line)


def _is_cell(value: Any) -> bool:
    return isinstance(value, Html) and value.startswith(("<td", "<th"))
