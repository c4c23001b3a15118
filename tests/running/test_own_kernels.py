"""Where llama.cpp is installed, what its own kernels make of a candidate's file stands beside the row's number."""

import pytest
import torch

from quantlab.backends import gguf
from quantlab.backends.gguf.kernels import library, logits_of
from quantlab.errors import ModelError
from tests.exporting.test_export import language_words
from tests.protocols.test_llama_cpp import merging_tokenizer
from tests.support.tiny_text_models import save_llama

SCHEME = ["backend=gguf", "dtype=q8_0", "quantization.layer_kinds=[linear,embedding]"]
OWN = ("quality/llama_cpp_kld_mean", "quality/llama_cpp_ppl")


def by_the_reference(folder):
    """A program that computes as the model does which the candidate was made from."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama")

    def answers(file, windows, num_threads):
        assert file.is_file()
        assert gguf_layers(file)
        with torch.no_grad():
            yield from (model(torch.tensor(window)[None]).logits[0].float().numpy() for window in windows)

    return answers


def gguf_layers(file):
    import gguf as library_of_files

    return [t for t in library_of_files.GGUFReader(file).tensors if t.tensor_type.name == "Q8_0"]


def test_the_figures_of_an_installed_program_stand_beside_the_rows(shell, monkeypatch, capsys):
    words = language_words(shell.folder)
    monkeypatch.setattr(gguf, "own_kernels", lambda: "llama.cpp (1.0)")
    monkeypatch.setattr(gguf, "logits_of", by_the_reference(shell.folder))
    code, out, err = shell(*words, *SCHEME)
    assert code == 0, err
    assert "kld_mean by llama.cpp's own kernels: " in " ".join(out.split())
    [row] = shell.rows(*words, *SCHEME, "sweep.force=true").values()
    assert row["metrics"][OWN[0]] == pytest.approx(0, abs=1e-9) != row["metrics"]["quality/kld_mean"]
    assert row["metrics"][OWN[1]] == pytest.approx(row["metrics"]["quality/ppl_ref"])


@pytest.mark.parametrize("error", [ModelError("llama.cpp ended"), OSError(28, "No space left on device")])
def test_a_program_that_fails_costs_its_figures_alone(shell, monkeypatch, error):
    def fails(*_):
        raise error
        yield

    words = language_words(shell.folder)
    monkeypatch.setattr(gguf, "own_kernels", lambda: "llama.cpp (1.0)")
    monkeypatch.setattr(gguf, "logits_of", fails)
    code, out, err = shell(*words, *SCHEME)
    assert code == 0, err
    assert f"no figure of llama.cpp (1.0): {error}" in " ".join(err.split())
    assert "by llama.cpp's own kernels" not in out


def test_another_backend_has_no_such_program(shell, monkeypatch):
    monkeypatch.setattr(gguf, "own_kernels", lambda: "llama.cpp (1.0)")
    [row] = shell.rows(*language_words(shell.folder), "backend=quanto", "dtype=int8").values()
    assert not set(OWN) & set(row["metrics"])


@pytest.mark.slow
@pytest.mark.skipif(library() is None, reason="llama.cpp is not there: pip install --no-deps xllamacpp==2026.10.11549")
def test_llama_cpp_computes_the_candidate_within_what_it_rounds(shell, tmp_path):
    """Its vocabulary wants merges."""
    words = language_words(shell.folder)
    tokenizer = merging_tokenizer(False)
    save_llama(shell.folder / "llama", hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(shell.folder / "llama")
    [row] = shell.rows(*words, *SCHEME).values()
    metrics = row["metrics"]
    assert metrics[OWN[1]] == pytest.approx(metrics["quality/ppl"], rel=0.05)
    assert metrics[OWN[0]] > metrics["quality/kld_mean"]
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="llama.cpp ended before it had answered .*error"):
        next(logits_of(tmp_path / "no.gguf", [[1, 2]], 1))
