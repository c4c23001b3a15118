"""What an export of quantlab says of its own files: the sha256 of each, by which damage is noticed wherever it is read.

A library loads a file of weights with a changed byte without a word, and the module answers other numbers than those
that the export was checked with.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantlab.errors import ModelError
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.files import object_in, sha256_of

MANIFEST = "quantlab_export.json"
"""In each export: what it is, and by what it is loaded. A folder that has it may be replaced by another export."""
DIGESTS = "sha256"
"""Its key of the files' digests, by their paths in the folder. Exports of before have none."""
_FILES_AT_ONCE = 4
_DEPTH = 2
"""A component's file lies in a folder of the export's."""


def file_digests(folder: Path) -> dict[str, str]:
    """Path within the folder -> sha256, of every file."""
    return _sha256({file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()})


def check_digests(key: str, place: Path) -> None:
    """ModelError beginning with ``key`` where a file of the export, or of the part of one, at ``place`` has changed.

    Files that the manifest does not name may be there, and those that it names may be missing: their reader says it.
    """
    place = place.absolute()
    for folder in (place, *place.parents)[: _DEPTH + 1]:
        said = _said(folder / MANIFEST)
        files = {name: folder / name for name in said if ".." not in Path(name).parts}
        here = {name: file for name, file in files.items() if file.is_relative_to(place) and file.is_file()}
        changed = [name for name, digest in _sha256(here).items() if digest != said[name]]
        if changed:
            raise ModelError(
                f"{key}: {some_of(changed, 4)} is not as it was exported "
                f"(another sha256 than {MANIFEST} says); copy or download the export again, or, where you changed it "
                f'on purpose, take its line out of "{DIGESTS}" there'
            )


def other_files(folder: Path) -> tuple[list[str], list[str]]:
    """Files of an export's folder that its manifest does not name, and those that it names and that are not there.

    Beside the card and its images, which users edit. None of either for exports of before, which name no files.
    """
    said = {*_said(folder / MANIFEST)}
    here = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    here = {name for name in here if name not in (MANIFEST, "README.md") and not name.startswith("images/")}
    return (sorted(here - said), sorted(said - here)) if said else ([], [])


def _said(manifest: Path) -> Mapping[str, object]:
    said = object_in(manifest).get(DIGESTS)
    return said if isinstance(said, dict) else {}


def _sha256(files: Mapping[str, Path]) -> dict[str, str]:
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return dict(zip(files, pool.map(sha256_of, files.values()), strict=True))
