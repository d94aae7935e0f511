"""Trained weights on disk, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from equipoise.balance.biases import put_back
from equipoise.balance.controllers.protocol import Acts
from equipoise.errors import EquipoiseError
from equipoise.lab.config import Config
from equipoise.lab.corpus import load_corpus, tokenizer_for_transformers
from equipoise.lab.export import target_of, to_transformers
from equipoise.lab.folder import RunFolder
from equipoise.lab.model import LanguageModel
from equipoise.lab.saving import saving
from equipoise.lab.states import whole_state

if TYPE_CHECKING:
    from equipoise.lab.run import Run

FILE = "weights.safetensors"

OUTSIDE = "outside_bias"
"""Begins the names of selection biases that the routers have no place for, as balancing put them on."""


def save_model(run: Run, path: Path) -> dict[str, Any]:
    """Write the weights, and the model for transformers where an architecture fits; says which."""
    state = {**whole_state(run.model, run.plain, run.processes), **_outside(run)}
    found: dict[str, Any] = {}
    with run.processes.together():
        if run.processes.first:
            found = _save(run, state, path)
    return found


def _save(run: Run, state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    _write(state, path / FILE)
    model = rebuilt(run.config, state)
    target = target_of(model)
    if any(name.startswith(OUTSIDE) for name in state):
        target = (
            f"balance={run.config.balance} put a selection bias on model.router="
            f"{run.config.model.router}, which has no place for it"
        )
    if isinstance(target, str):
        run.say(f"Not saved for transformers: {target}. equipoise.lab.load reads {path / FILE}.")
        return {"weights": FILE, "model": None, "why": target}
    tokenizer = tokenizer_for_transformers(run.corpus, run.config.model.max_positions)
    made = to_transformers(
        model,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with saving(path / "model" / "model.safetensors"), quiet():
        made.save_pretrained(path / "model")
        tokenizer.save_pretrained(path / "model")
    return {"weights": FILE, "model": "model", "architecture": target.name}


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar of the files that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _outside(run: Run) -> dict[str, Tensor]:
    """Biases that do not act as if they were not there, by layer and by how they act."""
    biases = [] if run.handle is None else run.handle.biases
    outside = {f"{OUTSIDE}.{n}.{b.acts}": b.read() for n, b in enumerate(biases) if not b.own}
    return {
        name: bias_E.clone()
        for name, bias_E in outside.items()
        if bool((bias_E != float(name.endswith("multiply"))).any())
    }


def _put_on(model: LanguageModel, outside: dict[str, Tensor]) -> None:
    """Let the routers select as they did in training."""
    biases: dict[int, tuple[Acts, Tensor]] = {}
    for name, bias_E in outside.items():
        _, number, acts = name.split(".")
        biases[int(number)] = ("multiply" if acts == "multiply" else "add", bias_E)
    put_back(model, biases)


def _write(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    tied = {name: value for name, value in state.items() if name != "head.weight"}
    if (
        "head.weight" in state
        and state["head.weight"].data_ptr() != state["embedding.weight"].data_ptr()
    ):
        tied["head.weight"] = state["head.weight"]
    with saving(path):
        save_file({name: value.contiguous() for name, value in tied.items()}, path)


def rebuilt(config: Config, state: dict[str, Tensor]) -> LanguageModel:
    """A model of its own with these weights."""
    model = LanguageModel(config.model, config.data.vocab_size)
    state = {name: value.cpu() for name, value in state.items()}
    outside = {name: state.pop(name) for name in list(state) if name.startswith(OUTSIDE)}
    if config.model.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    if outside:
        _put_on(model, outside)
    return model.eval()


def load(path: str | Path) -> LanguageModel:
    """The trained model of a run folder. EquipoiseError where the run is not finished."""
    from safetensors.torch import load_file

    folder = RunFolder(path)
    config = folder.config()
    file = folder.path / FILE
    if not file.exists():
        raise EquipoiseError(
            f"{path} holds no {FILE}: the run is not finished, or kept no weights."
        )
    with folder.readable(file):
        state = load_file(file)
    return rebuilt(config, state)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a run folder, made again from its text where the model folder has none."""
    from transformers import AutoTokenizer

    folder = RunFolder(path)
    if (folder.path / "model").exists():
        return AutoTokenizer.from_pretrained(folder.path / "model")
    config = folder.config()
    return tokenizer_for_transformers(load_corpus(config.data), config.model.max_positions)
