"""Every tag's name stands in one file, once."""

from __future__ import annotations

import re
from pathlib import Path

from quantlab.tracking import tags

NAMES = {name: value for name, value in vars(tags).items() if name.isupper()}
PACKAGE = Path(tags.__file__).parents[1]


def test_no_two_tags_share_a_name() -> None:
    assert len(set(NAMES.values())) == len(NAMES)
    assert all(re.fullmatch(r"(quantlab|mlflow)\.[\w.]+|export/\w+", value) for value in NAMES.values())


def test_no_other_file_spells_a_tag() -> None:
    spelled = re.compile("|".join(f"[\"'`]{re.escape(value)}[\"'`]" for value in NAMES.values()))
    docstring = re.compile(r"``[^`]*``")
    hits = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in PACKAGE.rglob("*.py")
        if path != Path(tags.__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if spelled.search(docstring.sub("", line))
    ]
    assert not hits


def test_every_tag_is_used() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py") if p != Path(tags.__file__))
    assert [name for name in NAMES if not re.search(rf"\b{name}\b", text)] == []
