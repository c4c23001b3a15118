"""Reports as a notebook shows them: HTML in which nothing that a report holds is markup. Torch-free."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from quantlab.progress import counted, printable

MAX_ROWS = 12
MAX_CHARS = 200
MAX_SAMPLES = 4


def as_html(report: Any, told: Callable[[Any], str]) -> str:
    """A table of its fields that say something, ``told`` in words; below it one for each list of parts, and images."""
    lines, below = [], []
    for one in fields(report):
        value = getattr(report, one.name)
        if value is None or (isinstance(value, (str, tuple, Mapping)) and not value):
            continue
        if isinstance(value, tuple) and is_dataclass(value[0]):
            below.append(_parts(one.name, value))
        elif isinstance(value, Mapping) and is_dataclass(next(iter(value.values()))):
            below.append(_named_parts(one.name, value, told))
        elif one.name == "images" and getattr(value, "ndim", 0) == 5:
            below.append(_picture(value))
        else:
            lines.append([one.name, _cell(value) if isinstance(value, float) else told(value)])
    head = f"<div><b>{_text(type(report).__name__)}</b></div>"
    return "\n".join([head, *([_table([], lines)] if lines else []), *below])


def _parts(name: str, parts: Sequence[Any]) -> str:
    """A row a part, a column a field in which they are not all empty."""
    keys = [one.name for one in fields(parts[0]) if any(_is_said(getattr(part, one.name)) for part in parts)]
    rows = [[_cell(getattr(part, key)) for key in keys] for part in parts[:MAX_ROWS]]
    left = len(parts) - len(rows)
    more = f"<div>... and {counted(left, 'more row')}</div>" if left else ""
    return f"<div>{_text(name)}</div>{_table(keys, rows)}{more}"


def _named_parts(name: str, parts: Mapping[str, Any], told: Callable[[Any], str]) -> str:
    rows = [[key, told(part)] for key, part in list(parts.items())[:MAX_ROWS]]
    left = len(parts) - len(rows)
    more = f"<div>... and {counted(left, 'more row')}</div>" if left else ""
    return f"<div>{_text(name)}</div>{_table([], rows)}{more}"


def _is_said(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, (str, tuple, Mapping)) and not value)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return " x ".join(map(str, value))
    if isinstance(value, Mapping):
        return counted(len(value), "value")
    return "" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(texts: Sequence[str], cell: str) -> str:
        return "".join(f'<{cell} style="text-align:left">{_text(text)}</{cell}>' for text in texts)

    top = f"<thead><tr>{row(head, 'th')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row(texts, 'td')}</tr>" for texts in rows)
    return f'<div style="overflow-x:auto"><table>{top}<tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(printable(text, MAX_CHARS))


def _picture(images: Any) -> str:
    """Samples below one another, each as reference, candidate and difference beside one another."""
    some = images[:MAX_SAMPLES]
    num, across, height, width, channels = some.shape
    pixels = some.transpose(0, 2, 1, 3, 4).reshape(num * height, across * width, channels)
    data = base64.b64encode(_png(pixels)).decode()
    return (
        "<div>reference, quantized, difference</div>"
        f'<img alt="samples" style="max-width:100%;image-rendering:pixelated;min-width:min(100%,240px)" '
        f'src="data:image/png;base64,{data}">'
    )


def _png(pixels: Any) -> bytes:
    """uint8 (height, width, 1 or 3) as a PNG."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
