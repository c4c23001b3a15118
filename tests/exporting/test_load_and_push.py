"""What an export is afterwards: loaded by one function, described by its card, and uploaded."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import pytest

import quantlab
from quantlab.errors import ConfigError, ModelError
from quantlab.exporting.folder import MANIFEST
from quantlab.exporting.push import push
from tests.support.shell import digits_words

WORDS = digits_words("evaluation.num_samples=10", "device=cpu", "sweep.floors=false")


def test_load_gives_back_the_module(exported):
    made = quantlab.load(exported.folder / "mine")
    assert type(made).__name__ == "DiTTransformer2DModel"
    assert not made.training
    assert type(made.transformer_blocks[0].attn1.to_q.weight).__name__ == "WeightQBytesTensor"


def test_load_takes_a_checkpoint_that_quantlab_did_not_write(tmp_path):
    from tests.support.tiny_text_models import save_llama

    made = quantlab.load(save_llama(tmp_path / "llama"))
    assert type(made).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no model"),
        ({"config.json": "{}"}, "names no class"),
        ({"config.json": '{"architectures": ["os.system"]}'}, "names os.system"),
        ({"config.json": '{"_class_name": "AutoModel", "auto_map": 3'}, "cannot be loaded"),
        ({MANIFEST: "{}"}, "of another version"),
        ({MANIFEST: '{"format": 1, "pipeline": "", "parts": {"x": {"target": "os:system", "method": "x", '
          '"subfolder": "", "file": ""}}}'}, "is no loader"),
        ({MANIFEST: '{"format": 1, "pipeline": "", "parts": {"x": {"target": "diffusers:UNet", "method": '
          '"from_single_file", "subfolder": "..", "file": "../../x"}}}'}, "is no loader"),
    ],
)  # fmt: skip
def test_load_refuses_in_words(tmp_path, content, said):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ConfigError, ModelError), match=said) as refused:
        quantlab.load(tmp_path)
    assert str(refused.value).startswith("path=")


CODE = "import pathlib\npathlib.Path(__file__).with_name('was_run').touch()\n"
TOLD = {"target": "transformers:AutoModelForCausalLM", "method": "from_pretrained", "subfolder": "", "file": "",
        "arguments": {}, "dtype": "float32", "needs_gpu": False, "before": ""}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arguments": {"trust_remote_code": True}}, "tells the loader trust_remote_code=True"),
        ({"arguments": {"code_revision": "main", "trust_remote_code": True}}, "tells the loader code_revision="),
        ({"target": "diffusers:DiffusionPipeline", "arguments": {"custom_pipeline": "/x"}}, "custom_pipeline="),
        ({"arguments": {"dtype": "load"}}, "tells the loader dtype='load'"),
        ({"dtype": "hub"}, "tells the loader dtype='hub'"),
        ({"arguments": {"gguf_file": "../x.gguf"}}, "tells the loader gguf_file="),
        ({"arguments": {"cache_dir": "elsewhere"}}, "tells the loader cache_dir="),
        ({"subfolder": "..", "file": "theirs/model.gguf"}, "is no loader"),
        ({}, "remote code: not run"),
    ],
)
def test_no_word_of_a_manifest_runs_code_that_lies_beside_it(tmp_path, changes, said):
    """``trust_remote_code`` was handed to the library, which ran the Python file of the folder."""
    from tests.support.tiny_text_models import save_llama

    folder = save_llama(tmp_path / "theirs")
    (folder / "its_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "its_own.Mine", "AutoModelForCausalLM": "its_own.Mine"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": names}))
    manifest = {"format": 1, "pipeline": "", "parts": {"model": {**TOLD, **changes}}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((ConfigError, ModelError), match=said) as refused:
        quantlab.load(folder)
    assert str(refused.value).startswith("path=")
    assert not list(tmp_path.rglob("was_run"))


def test_no_part_of_a_manifest_is_a_word_of_the_pipelines_loader(tmp_path):
    from tests.support.tiny_pipelines import build_tiny_flux

    folder = build_tiny_flux(tmp_path / "flux")
    part = {**TOLD, "target": "diffusers:FluxTransformer2DModel", "subfolder": "transformer", "before": ""}
    manifest = {"format": 1, "pipeline": "diffusers:FluxPipeline", "parts": {"trust_remote_code": part}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has a part trust_remote_code, and model_index.json none"):
        quantlab.load(folder)


def test_load_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        quantlab.load(tmp_path / "none")


def test_the_three_lines_of_the_card_load_it(exported):
    card = (exported.folder / "mine" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) == 3
    found: dict[str, object] = {}
    with contextlib.chdir(exported.folder / "mine"):
        exec(code, found)  # noqa: S102  (the card's own lines are what is tested)
    assert type(found["model"]).__name__ == "DiTTransformer2DModel"


def test_the_card_is_one_that_the_hub_reads(exported):
    from huggingface_hub import ModelCard

    folder = exported.folder / "mine"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert {"quantized", "quanto", "int8"} <= set(card.data.tags)
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    run = exported.tracked()["quanto int8"]
    assert values["latent_rel_mse"] == pytest.approx(run["metrics"]["quality/latent_rel_mse"], rel=1e-5)
    assert (folder / "images" / "reference_quantized_difference.png").is_file()
    for wanted in (
        "## Scheme",
        "## Bytes",
        "## Quality",
        "weights, as planned",
        "to run it on one device",
        "quantlab recipe=",
        "## Checked",
    ):
        assert wanted in card.text


@contextlib.contextmanager
def hub(status: int = 200):
    """A Hub on this machine: what it was asked, and what it was sent."""
    asked: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self, data: object) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, body))
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                self._answer(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            elif "/commit/" in self.path:
                self._answer({"commitUrl": f"{url}/me/it/commit/1", "commitOid": "1", "pullRequestUrl": None})
            else:
                self._answer({"url": f"{url}/me/it", "id": "me/it"})

        def do_GET(self) -> None:
            asked.append((self.path, b""))
            self._answer({"id": "me/it", "sha": "0" * 40, "siblings": []})

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield url, asked
    finally:
        server.shutdown()
        server.server_close()


def test_push_sends_every_file(exported, monkeypatch):
    with hub() as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        code, out, err = exported("push", "latest", "me/it")
    assert code == 0, err
    assert out.strip() == f"{url}/me/it/commit/1"
    commit = next(body for path, body in asked if "/commit/" in path)
    sent = {json.loads(line)["value"]["path"] for line in commit.splitlines() if json.loads(line)["key"] == "file"}
    folder = exported.folder / "mine"
    assert sent == {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert all(url_path.startswith("/api/") for url_path, _ in asked)


@pytest.mark.parametrize("repo", ["me", "me/it/more", "../it", "me/ it", "http://x/y"])
def test_push_wants_the_name_of_a_repository(exported, repo):
    with pytest.raises(ConfigError, match="owner/name"):
        push(exported.folder / "mine", repo)


def test_push_of_no_export(exported, tmp_path):
    with pytest.raises(ConfigError, match="no export"):
        push(tmp_path, "me/it")


def test_a_hub_that_refuses_is_told(exported, monkeypatch):
    with hub(status=403) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        with pytest.raises(ModelError, match="does not take me/it"):
            push(exported.folder / "mine", "me/it")


def test_a_run_without_an_export_is_not_pushed(exported, tmp_path):
    code, _, err = exported("push", "nobody", "me/it")
    assert code == 2
    assert "no such run" in err


def test_a_run_is_pushed_from_where_its_record_lies(exported):
    code, _, err = exported("push", "latest", "no name of a repository", "output_dir=outputs")
    assert (code, "no name of a repository" in err) == (2, True), err
    code, _, err = exported("push", "latest", "me/it", "outputdir=outputs")
    assert (code, "outputdir: push takes" in err) == (2, True), err


def test_push_tells_what_is_not_of_the_export_and_refuses_what_lacks_a_file(exported, monkeypatch, capsys):
    folder = exported.folder / "mine"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("", "stray.txt"):
        if name:
            (folder / name).write_text("mine")
        with pytest.raises(ModelError, match=r"^push: http://127.0.0.1:9 does not take me/it \("):
            push(folder, "me/it")
        said = capsys.readouterr().err
        assert ("is not of the export, and is uploaded, too" in " ".join(said.split())) == bool(name)
    (folder / "stray.txt").unlink()
    [file] = folder.rglob("*.safetensors")
    file.rename(file.with_suffix(".kept"))
    try:
        with pytest.raises(
            ModelError, match=r"^push: \S+.safetensors of the export in .* is not there; export the run"
        ):
            push(folder, "me/it")
    finally:
        file.with_suffix(".kept").rename(file)
