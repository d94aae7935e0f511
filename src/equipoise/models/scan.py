"""A model's modules by clean path, with what neighbours and configs say about each."""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_ROUTER_NAMES = ("gate", "router")


class Scan:
    """One walk over a model: modules by path without the names that wrappers put in between."""

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        self.model = model
        # The inner module comes after its wrapper and takes its path.
        self.modules = {clean(path): module for path, module in model.named_modules()}
        self.config: Any = getattr(self.modules[""], "config", None)
        self.family = str(
            getattr(self.config, "model_type", None) or type(self.modules[""]).__name__
        )
        self.router_classes = _declared_routers(self.modules)

    def parent(self, path: str) -> tuple[str, nn.Module]:
        """Path and module that hold the module at `path`."""
        above = path.rpartition(".")[0]
        return above, self.modules[above]

    def config_of(self, path: str) -> Any:
        """The config of the module at `path` or of the nearest module around it."""
        while True:
            config = getattr(self.modules[path], "config", None)
            if config is not None or not path:
                return config
            path = path.rpartition(".")[0]

    def router_beside(self, path: str) -> nn.Module | None:
        """The router next to the experts at `path`: of a class the model declares, else by name."""
        _, parent = self.parent(path)
        children = [(n, m) for n, m in parent.named_children() if m is not self.modules[path]]
        for _, child in children:
            if isinstance(child, self.router_classes):
                return child
        return next((child for name, child in children if name in _ROUTER_NAMES), None)


def clean(path: str) -> str:
    """A module path without the components that torch's wrappers add."""
    return ".".join(piece for piece in path.split(".") if piece not in _WRAPPERS)


def split(path: str) -> tuple[str, int]:
    """Stack and layer number of a module path: 'model.layers.3.mlp' gives ('model.layers', 3)."""
    pieces = path.split(".")
    for at, piece in enumerate(pieces):
        if piece.isdigit():
            return ".".join(pieces[:at]), int(piece)
    return "", 0


def class_names(module: nn.Module) -> set[str]:
    """Names of a module's class and of the classes it comes from."""
    return {cls.__name__ for cls in type(module).__mro__}


def _declared_routers(modules: dict[str, nn.Module]) -> tuple[type, ...]:
    # transformers models declare where their router logits come from, one recorder or several.
    found: list[type] = []
    for module in modules.values():
        declared = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in declared if isinstance(declared, list | tuple) else [declared]:
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                found.append(target)
    return tuple(dict.fromkeys(found))
