"""What a trace says about how it was made: model, versions, time, speed, memory."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import nn


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Model id, family, digest of its config, parameters, device and dtype."""
    config: Any = getattr(model, "config", None)
    parameter = next(model.parameters(), None)
    return {
        "model": getattr(config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "family": getattr(config, "model_type", None),
        "config_digest": config_digest(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(parameter.device) if parameter is not None else None,
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else None,
    }


def config_digest(config: Any) -> str | None:
    """SHA-256 of a config without its name and version: equal for equal architectures."""
    if not hasattr(config, "to_dict"):
        return None
    values = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        values.pop(key, None)
    text = json.dumps(values, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def provenance() -> dict[str, Any]:
    """Versions of what ran, and on what."""
    names = ("equipoise", "torch", "transformers", "numpy", "pyarrow")
    return {
        "framework": "transformers",
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


class Clock:
    """Wall time of the run and of its forward passes, and peaks of memory."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._started = datetime.now(UTC)
        self._first: float | None = None
        self._last = self._forward = self._begin = 0.0

    @property
    def ran(self) -> bool:
        """A forward pass has begun."""
        return self._first is not None

    def start(self) -> None:
        """A forward pass begins."""
        self._begin = time.perf_counter()
        self._first = self._begin if self._first is None else self._first

    def stop(self) -> None:
        """A forward pass ends (on an accelerator: was launched)."""
        self._last = time.perf_counter()
        self._forward += self._last - self._begin

    def figures(self, tokens: int) -> dict[str, Any]:
        """Times in seconds, memory in bytes."""
        seconds = self._last - self._first if self._first is not None else 0.0
        memory = [torch.cuda.max_memory_allocated(device) for device in self._devices]
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "forward_seconds": round(self._forward, 3),
            "recorded_tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "peak_host_bytes": _peak_host_bytes(),
            "peak_device_bytes": max(memory) if memory else None,
        }


def _peak_host_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
