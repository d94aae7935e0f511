"""Small language models, trained to see what balancing does: recipes, runs, experiments.

    equipoise train small_switch --out runs/switch --set balance="sign(rate=0.01)"

| module | holds |
|---|---|
| `config`, `checks`, `terms`, `recipes` | what a run is, and may not be; terms as text; named configs |
| `corpus`, `hub`, `batches` | text to token streams by domain; which rows make which step |
| `model`, `routers`, `loss` | the language model around `nn.MoELayer` |
| `trainer`, `run`, `journal`, `optim` | training: the loop, what it notes, its optimizers |
| `processes`, `states` | one process or several; checkpoints |
| `meter`, `evaluate` | loads in training; losses and loads on held-out text by domain |
| `folder`, `weights`, `export` | a run's folder; its weights, also as a transformers model |
| `stopping`, `saving`, `diagnosis` | Ctrl-C; a full disk; where NaN came from |
| `fused`, `leak` | faster parts for a CPU; what layers that look at later tokens gain by it |
| `experiments`, `grid`, `pages` | questions as grids of runs; running them; their pages |
| `results`, `turns`, `figures`, `run_figures` | finished runs read back; step times; drawings |
| `cost` | steps of two processes under imposed loads |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.lab.config import Config, DataConfig, ModelConfig, OptimizerConfig
    from equipoise.lab.corpus import load_corpus
    from equipoise.lab.model import LanguageModel
    from equipoise.lab.recipes import RECIPES, recipe
    from equipoise.lab.trainer import train
    from equipoise.lab.weights import load

_HOMES = {
    "Config": "config",
    "DataConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "LanguageModel": "model",
    "RECIPES": "recipes",
    "recipe": "recipes",
    "load": "weights",
    "load_corpus": "corpus",
    "train": "trainer",
}
__all__ = [
    "RECIPES",
    "Config",
    "DataConfig",
    "LanguageModel",
    "ModelConfig",
    "OptimizerConfig",
    "load",
    "load_corpus",
    "recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    # Recipes and configs are read without torch; training loads it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"equipoise.lab.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'equipoise.lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
