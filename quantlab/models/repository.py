"""The files of a checkpoint before its weights are there: those of a folder, or of a Hub id, of which no more than the
configurations are fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import ModelError, first_line
from quantlab.models.reading import as_model_error

_PATIENCE_S = 10.0
_WAY_OUT = "check the name and the network; without a network only what is in the local Hub cache can be named by id"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Names and texts of files, and no weights."""

    names: frozenset[str]
    """Paths of the files below it, with slashes, at most one folder deep."""
    fetch: Callable[[str], Path]
    """Where a file of it lies on this machine; ModelError for one that cannot be had."""

    def holds(self, part: str) -> bool:
        """Whether there is a folder of this name, with something in it."""
        return any(name.startswith(f"{part}/") for name in self.names)

    def text(self, name: str) -> str:
        """What a file says; "" where there is no such file."""
        return self.fetch(name).read_text(encoding="utf-8", errors="replace") if name in self.names else ""


def of_folder(folder: Path) -> Repository:
    """The files of a folder."""
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file()]
    return Repository(
        names=frozenset(file.relative_to(folder).as_posix() for file in files), fetch=lambda name: folder / name
    )


def folder_here(path: str, revision: str | None, index: str) -> Path | None:
    """Where the local Hub cache has the files of an id, of which ``index`` is one; None where it has none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(path, index, revision=revision)
    except ValueError:  # no id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def of_hub(key: str, path: str, revision: str | None, index: str) -> Repository | None:
    """The files of a Hub id; where the Hub cannot be reached those in the local cache, and None where there are none.

    ``index`` is the file that a checkpoint of this kind has. Raises ModelError, beginning with ``key``, for an id that
    the Hub does not know or does not give.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetch(name: str) -> Path:
        with as_model_error(f"{key}: {name}", _WAY_OUT):
            return Path(hf_hub_download(path, name, revision=revision))

    try:
        found = HfApi().model_info(path, revision=revision, timeout=_PATIENCE_S)
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{key}: it cannot be had from the Hub ({first_line(error)}); {_WAY_OUT}") from error
    except Exception:  # noqa: BLE001 - offline by choice or by fate: each version of the client has its own words
        folder = folder_here(path, revision, index)
        return of_folder(folder) if folder is not None else None
    return Repository(names=frozenset(file.rfilename for file in found.siblings or ()), fetch=fetch)
