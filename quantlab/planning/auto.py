"""``model=auto model.path=...``: the word is replaced by the family that the checkpoint says, with its defaults."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.errors import ConfigError
from quantlab.models.auto import AUTO, family_of_checkpoint

_WORD, _PATH, _REVISION = f"model={AUTO}", "model.path=", "model.revision="


def chosen_family(words: Sequence[str]) -> list[str]:
    """The words with ``model=auto`` replaced; ConfigError where several checkpoints are meant."""
    if _WORD not in words:
        return list(words)
    paths = [_unquoted(w.removeprefix(_PATH)) for w in words if w.startswith(_PATH)]
    if len(paths) > 1 or any("," in path for path in paths):
        raise ConfigError(f"{_WORD}: it looks at one checkpoint; give one model.path, or name the families")
    revision = next((_unquoted(w.removeprefix(_REVISION)) for w in words if w.startswith(_REVISION)), None)
    family = family_of_checkpoint(paths[0] if paths else None, revision)
    return [f"model={family}" if word == _WORD else word for word in words]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
