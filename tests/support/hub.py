"""A Hub on this machine: it lists and gives the files of folders, and remembers what it was asked for."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

_COMMIT = "0" * 40


@contextmanager
def local_hub(models: Mapping[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """While it lasts, Hub ids are these folders; yields the files that were fetched, as ``owner/name/file``."""
    fetched: list[str] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(is_head=True)

        def do_GET(self) -> None:
            self.answer(is_head=False)

        def answer(self, is_head: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                name = "/".join(path.split("/")[2:4])
                if name not in models:
                    return self.give(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
                found = [f for f in models[name].rglob("*") if f.is_file()]
                if "/tree/" in path:
                    tree = [
                        {
                            "type": "file",
                            "path": f.relative_to(models[name]).as_posix(),
                            "size": f.stat().st_size,
                            "oid": _COMMIT,
                        }
                        for f in found
                    ]
                    return self.give(200, json.dumps(tree).encode())
                files = [f.relative_to(models[name]).as_posix() for f in found]
                said = {"id": name, "modelId": name, "sha": _COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self.give(200, json.dumps(said).encode())
            owner, model, _, _, file = path.split("/", 4)
            place = models[f"{owner}/{model}"] / file
            if not place.is_file():
                return self.give(404, b"", **{"X-Error-Code": "EntryNotFound"})
            data = place.read_bytes()
            if not is_head:
                fetched.append(f"{owner}/{model}/{file}")
            return self.give(200, data, is_head, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

        def give(self, status: int, data: bytes, is_head: bool = False, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": _COMMIT, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if not is_head:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    try:
        yield fetched
    finally:
        server.shutdown()
        server.server_close()
