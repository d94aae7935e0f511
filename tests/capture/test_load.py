"""Loading models: what is found, and one line for what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from equipoise.capture.load import BUNDLED, find_model, load_model
from equipoise.errors import EquipoiseError
from tests.capture.mmlu_tools import make_model, make_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("olmoe", torch.float32).save_pretrained(folder)
    make_tokenizer("byte_bpe").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_gives_model_tokenizer_and_provenance(saved: Path) -> None:
    loaded = load_model(str(saved), device="cpu")
    expected = make_model("olmoe", torch.float32)
    ids = torch.tensor([loaded.tokenizer.encode("the cell")])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits)
    assert not loaded.model.training
    assert (loaded.id, loaded.revision, loaded.notes) == ("tiny", None, [])
    assert loaded.meta() == {"model": "tiny", "revision": None}


@pytest.mark.parametrize(("dtype", "implementation"), [("bfloat16", None), ("float64", "eager")])
def test_dtype_and_expert_implementation(saved: Path, dtype: str, implementation: Any) -> None:
    loaded = load_model(str(saved), dtype=dtype)
    assert loaded.model.dtype == getattr(torch, dtype)
    if implementation:
        assert loaded.model.config._experts_implementation == implementation
        assert "float64" in loaded.notes[0]


def test_a_dense_model_loads(tmp_path: Path) -> None:
    make_model("llama", torch.float32).save_pretrained(tmp_path)
    make_tokenizer("byte_bpe").save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.config.model_type == "llama"


@pytest.mark.parametrize("name", BUNDLED)
def test_the_demos_are_there(name: str) -> None:
    assert (Path(find_model(name)) / "model.safetensors").stat().st_size < 6_000_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmeo", "Did you mean 'demo'"),
        ("./nowhere/at/all", "no folder ./nowhere/at/all"),
        ("a/b/c", "no folder a/b/c"),
        ("owner/my model!", "no folder owner/my model!"),
    ],
)
def test_a_name_that_cannot_be_a_model_needs_no_network(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.capture.load._check_hub", pytest.fail)
    with pytest.raises(EquipoiseError, match=message):
        find_model(name)


def test_a_folder_that_is_no_model_says_what_is_missing(copy: Path) -> None:
    with pytest.raises(EquipoiseError, match="is a file"):
        find_model(str(copy / "config.json"))
    for file in copy.glob("*tokenizer*"):
        file.unlink()
    with pytest.raises(EquipoiseError, match="no tokenizer"):
        find_model(str(copy))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(EquipoiseError, match="only pickled weights, which are never opened"):
        find_model(str(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(EquipoiseError, match="no weights"):
        find_model(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(EquipoiseError, match="no config"):
        find_model(str(copy))


def test_a_checkpoint_that_lacks_weights_is_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EquipoiseError, match=r"incomplete: 1 missing keys.*model\.norm\.weight"):
        load_model(str(copy))


def test_faults_of_the_files_are_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(EquipoiseError, match="the weights of") as error:
        load_model(str(copy))
    assert "\n" not in str(error.value)
    change_config(copy, model_type="nonsense")
    with pytest.raises(EquipoiseError, match=r"the config of .*nonsense"):
        load_model(str(copy))


def test_code_of_a_checkpoint_is_not_run_unless_asked(copy: Path) -> None:
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(copy, model_type="own", auto_map=own)
    (copy / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(EquipoiseError, match="--trust-remote-code only if you trust"):
        load_model(str(copy))


def test_a_model_that_is_not_causal_is_refused(copy: Path) -> None:
    change_config(copy, model_type="t5")
    with pytest.raises(EquipoiseError, match=r"\(t5\) is not a causal language model"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "Did you mean 'float16'"),
        ({"device": "gpu0"}, "device 'gpu0' cannot be used"),
        ({"experts_implementation": "fast"}, "experts_implementation"),
    ],
)
def test_a_wrong_option_is_named(saved: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(EquipoiseError, match=message):
        load_model(str(saved), **options)  # type: ignore[arg-type]


def test_every_answer_of_the_hub_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    response = Mock(headers={})
    cases = [
        (errors.GatedRepoError("x", response=response), "is gated"),
        (errors.RevisionNotFoundError("x", response=response), "has no revision 'v9'"),
        (errors.RepositoryNotFoundError("x", response=response), "no model owner/name on the hub"),
        (errors.EntryNotFoundError("x"), "has no config.json"),
        (ConnectionError("x"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached"),
    ]
    for error, message in cases:

        def answer(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
        with pytest.raises(EquipoiseError, match=message):
            find_model("owner/name", "v9")
