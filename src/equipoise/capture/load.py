"""Load a model and its tokenizer from the hub, a folder, or the demo models of this package.

Weights come from safetensors only: no pickle is opened. Code that comes with a checkpoint runs only
when asked for. What can be known without torch is found out before it is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

DEMO = "demo"
BUNDLED = (DEMO, "demo-balanced")
"""Models of this package, by their folder in `data/`: one without balancing, and its balanced twin."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
    "tekken.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass
class LoadedModel:
    """A model ready to run, and what a trace should know of it."""

    model: Any
    tokenizer: Any
    id: str
    """As the user named it: "demo", "demo-balanced", a hub id, or a folder's name."""
    revision: str | None
    """Commit of the hub's repository; None for a folder."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: a vision model used for text, another expert implementation."""

    def meta(self) -> dict[str, Any]:
        """Provenance for the trace."""
        return {"model": self.id, "revision": self.revision}


def find_model(name: str, revision: str | None = None) -> str:
    """The folder or hub id behind a model's name; EquipoiseError for what cannot be a model.

    Quick, and without torch: the hub is only asked whether it has the model's config, so that a
    wrong name or a missing network is known before anything else is done.
    """
    if name in BUNDLED:
        folder = resources.files("equipoise").joinpath("data", name)
        return _check_folder(Path(str(folder)), name)
    path = Path(name).expanduser()
    if path.exists():
        return _check_folder(path, name)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise EquipoiseError(f"no folder {name}.{nearest(path.name, beside)}")
    if "/" not in name and (hint := nearest(name, BUNDLED)):
        raise EquipoiseError(
            f"no model {name!r}: not a folder here, nor an owner/name of the hub.{hint}"
        )
    _check_hub(name, revision)
    return name


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    experts_implementation: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    `device` is "auto" (all GPUs, else one, else the CPU) or a torch device; `dtype` "auto" takes
    the checkpoint's own. A checkpoint for images and text is loaded for text alone, with a note.
    Raises EquipoiseError in one line for whatever is missing, unreachable, incomplete or not
    allowed.
    """
    if dtype not in DTYPES:
        raise EquipoiseError(
            f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}"
        )
    source = find_model(name, revision)
    return _Loader(name, source, trust_remote_code, revision).load(
        device, dtype, experts_implementation
    )


def _check_folder(path: Path, name: str) -> str:
    if not path.is_dir():
        raise EquipoiseError(f"{name} is a file; a model is a folder with config.json, or a hub id")
    if not (path / "config.json").is_file():
        raise EquipoiseError(f"{name} is not a model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        pickled = any(next(path.glob(pattern), None) for pattern in _PICKLES)
        reason = "only pickled weights, which are never opened" if pickled else "no weights"
        raise EquipoiseError(
            f"{name} has {reason}; *.safetensors is needed (model.save_pretrained writes it)"
        )
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise EquipoiseError(f"{name} has no tokenizer; put tokenizer.json beside config.json")
    return str(path)


def _check_hub(name: str, revision: str | None) -> None:
    """Ask the hub once, without the client's retries, unless the cache has the model's config."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except hub.GatedRepoError as error:
        raise EquipoiseError(
            f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise EquipoiseError(f"{name} has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise EquipoiseError(
            f"no model {name} on the hub, or it is private (`hf auth login`), and no such folder here"
        ) from error
    except hub.EntryNotFoundError as error:
        raise EquipoiseError(f"{name} has no config.json: not a transformers model") from error
    except Exception as error:  # the client lets its transport's own types through
        raise EquipoiseError(
            f"the hub cannot be reached and {name} is not in its local cache. Check the network, name"
            f" a local folder, or use {DEMO!r}."
        ) from error


@dataclass
class _Loader:
    """The part that needs transformers and torch."""

    name: str
    source: str
    trust_remote_code: bool
    revision: str | None
    notes: list[str] = field(default_factory=list)

    def load(self, device: str, dtype: str, experts: str | None) -> LoadedModel:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        config = self._call("config", AutoConfig.from_pretrained)
        tokenizer = self._call("tokenizer", AutoTokenizer.from_pretrained)
        kwargs = self._placement(device) | {"dtype": dtype, "use_safetensors": True}
        if experts is None and dtype == "float64":
            experts = "eager"
            self.notes.append("experts run one by one (eager): grouped kernels have no float64")
        if experts is not None:
            kwargs["experts_implementation"] = experts
        model, info = self._call(
            "weights", self._auto_class(config).from_pretrained, output_loading_info=True, **kwargs
        )
        self._check_complete(info)
        if "device_map" not in kwargs:
            model = model.to(self._device(device))
        return LoadedModel(
            model=model.eval(),
            tokenizer=tokenizer,
            id=self._id(),
            revision=getattr(config, "_commit_hash", None),
            notes=self.notes,
        )

    def _id(self) -> str:
        """As the user named it; of a local folder its last name, never the machine's path."""
        path = Path(self.name).expanduser()
        return path.resolve().name if self.name not in BUNDLED and path.exists() else self.name

    def _call(self, part: str, function: Any, **kwargs: Any) -> Any:
        """Call a from_pretrained; its many faults become one line that says which part failed."""
        common = {"trust_remote_code": self.trust_remote_code, "revision": self.revision or "main"}
        try:
            return function(self.source, **common, **kwargs)
        except MemoryError:
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise EquipoiseError(
                    f"{self.name} does not fit the device's memory; try --dtype bfloat16"
                ) from error
            raise EquipoiseError(f"the {part} of {self.name}: {_reason(error)}") from error

    def _auto_class(self, config: Any) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        own_code = getattr(config, "auto_map", None) or {}
        if type(config) in AutoModelForCausalLM._model_mapping or (
            self.trust_remote_code and "AutoModelForCausalLM" in own_code
        ):
            return AutoModelForCausalLM
        if type(config) in AutoModelForImageTextToText._model_mapping:
            self.notes.append(
                f"{config.model_type} is a model of images and text, used for text alone"
            )
            return AutoModelForImageTextToText
        raise EquipoiseError(
            f"{self.name} ({config.model_type}) is not a causal language model: it cannot answer MMLU"
            " or read text token by token"
        )

    def _placement(self, device: str) -> dict[str, Any]:
        """Let the weights go straight to their devices where accelerate is there to do it."""
        import torch

        try:
            import accelerate  # noqa: F401
        except ImportError:
            return {}
        several = device == "auto" and torch.cuda.device_count() > 1
        return {"device_map": "auto" if several else str(self._device(device))}

    def _device(self, device: str) -> Any:
        import torch

        if device == "auto":
            best = (
                torch.accelerator.current_accelerator()
                if torch.accelerator.is_available()
                else None
            )
            return torch.device("cpu") if best is None else best
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise EquipoiseError(
                f"device {device!r} cannot be used: {_reason(error)} Use auto, cpu, cuda or cuda:N."
            ) from error

    def _check_complete(self, info: Mapping[str, Iterable[Any]]) -> None:
        """Weights that the checkpoint lacks would be random, and so would every figure."""
        for kind in ("missing_keys", "mismatched_keys"):
            keys = sorted(map(str, info.get(kind) or ()))
            if keys:
                raise EquipoiseError(
                    f"{self.name} is incomplete: {len(keys)} {kind.replace('_', ' ')}, the first is "
                    f"{keys[0]}; they would be random. Check the checkpoint and its config."
                )


def _reason(error: BaseException) -> str:
    """The first line of an error, or what to do where the cause is known."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it brings its own code; pass --trust-remote-code only if you trust its author"
    first = next(iter(text.splitlines()), "") or type(error).__name__
    return first if len(first) <= 300 else first[:297] + "..."
