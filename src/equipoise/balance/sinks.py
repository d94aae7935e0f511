"""Sinks: where the metrics of training go. A sink is a callable (metrics, step).

`tensorboard` and `wandb` take the figures of `handle.metrics()`; `trace` takes the counts of every
step into a Trace, which every command reads (`equipoise stats run.trace --by domain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from equipoise.errors import EquipoiseError, TraceError
from equipoise.trace.files import PartWriter, list_array, lock_part, prepare_folder
from equipoise.trace.merge import read_manifests
from equipoise.trace.schema import SEQUENCES_SCHEMA, Layer, Manifest, counts_schema, name_layers

if TYPE_CHECKING:
    from equipoise.balance.attach import Handle
    from equipoise.models import RouterSite

SPAN = 100
"""Steps that a trace puts under one label, so that early and late training can be compared."""


class Sink(Protocol):
    """Takes the metrics of one optimizer step."""

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep them."""
        ...


def tensorboard(writer: Any) -> Sink:
    """Scalars of a TensorBoard SummaryWriter, or of a new one for the folder that is named."""
    if isinstance(writer, str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EquipoiseError(
                "sinks.tensorboard needs the package tensorboard: pip install tensorboard."
            ) from error
        writer = SummaryWriter(str(writer))

    def sink(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return sink


def wandb(run: Any = None, **init: Any) -> Sink:
    """A Weights & Biases run: the one given, else the one that is open, else wandb.init(**init).

    Everything under balance/ has `balance/step` as its horizontal axis, so that it stands beside
    what others log. mode="offline" (or WANDB_MODE=offline) needs no network.
    """
    if run is None:
        try:
            import wandb as library
        except ImportError as error:
            raise EquipoiseError(
                "sinks.wandb needs the package wandb: pip install wandb."
            ) from error
        run = library.run or library.init(**init)
    run.define_metric("balance/*", step_metric="balance/step")

    def sink(metrics: Mapping[str, float], step: int) -> None:
        run.log({**metrics, "balance/step": step})

    return sink


def trace(path: str | Path, handle: Handle, **options: Any) -> TraceSink:
    """The counts of every step as a Trace folder; options as of `TraceSink`."""
    return TraceSink(path, handle, **options)


class TraceSink:
    """Writes one window of counts per optimizer step; of all ranks, by the first of them.

    span: steps under one label (`domain`), such as "steps 1-100".
    force: overwrite a trace at `path`; resume: go on with it, as a new part.
    Raises TraceError where the folder cannot be written, or `resume` finds other layers.
    """

    def __init__(
        self,
        path: str | Path,
        handle: Handle,
        *,
        span: int = SPAN,
        force: bool = False,
        resume: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if span < 1:
            raise EquipoiseError(f"sinks.trace: span={span}, but a label covers at least one step.")
        if force and resume:
            raise EquipoiseError("sinks.trace: force and resume exclude each other.")
        self.path, self.handle, self.span = Path(path), handle, span
        described = name_layers([_layer(site) for site in handle.sites])
        places = {site.path: index for index, site in enumerate(handle.sites)}
        self._order = [places[layer.path] for layer in described]
        manifest = Manifest(described, level="counts", meta={**_meta(handle), **(meta or {})})
        self._part: PartWriter | None = None
        self._windows = 0
        if dist.is_available() and dist.is_initialized() and dist.get_rank(handle.book.group):
            return
        self._lock = lock_part(self.path, 0)
        try:
            if resume and self.path.exists() and any(self.path.glob("trace*.json")):
                _continue(self.path, manifest)
            else:
                prepare_folder(self.path, force)
            self._part = PartWriter(self.path, manifest)
        except BaseException:
            self._lock.release()
            raise

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the counts of the step that ended last; the metrics can be had from them."""
        self.write(step)

    def write(self, step: int) -> None:
        """Write the counts of the step that ended last, which is number `step`, from 1."""
        if self._part is None:
            return
        schema = counts_schema(self._part.manifest.layers)
        counts, tokens = self.handle.counts(), self.handle.tokens()
        counts_L = [counts[i].cpu().numpy().astype(np.int64) for i in self._order]
        tokens_L = np.array([tokens[i] for i in self._order], np.int64)
        top_k_L = np.array([layer.top_k for layer in self._part.manifest.layers])
        routed_L = np.array([counts_E.sum() for counts_E in counts_L])
        first = (max(step, 1) - 1) // self.span * self.span + 1
        label = f"steps {first}-{first + self.span - 1}" if self.span > 1 else f"step {first}"
        cells = {
            "tokens": tokens_L,
            "unrouted": tokens_L * top_k_L - routed_L,
            "counts": np.concatenate(counts_L),
        }
        plain = {
            "window": self._windows,
            "domain": label,
            "role": "none",
            "phase": "prefill",
            "rows": int(tokens_L[0]),
        }
        columns = [
            list_array(cells[f.name][None].astype(np.uint32), f.type)
            if f.name in cells
            else pa.array([plain.get(f.name)], f.type)
            for f in schema
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        none = pa.RecordBatch.from_pylist([], schema=SEQUENCES_SCHEMA)
        self._part.write_window(batch, none, [])
        self._windows += 1

    def close(self, status: str = "complete") -> None:
        """Write totals and close the files; without it the trace stays readable, and "partial"."""
        if self._part is not None:
            self._part.close(status)
            self._lock.release()
            self._part = None

    def __enter__(self) -> TraceSink:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close("complete" if kind is None else "partial")


def _layer(site: RouterSite) -> Layer:
    return Layer(
        site.layer,
        site.path,
        site.num_experts,
        site.top_k,
        stack=site.stack,
        score_function=site.score_function,
        selection_bias=site.selection_bias,
        shared_experts=site.shared_experts,
    )


def _meta(handle: Handle) -> dict[str, Any]:
    config = getattr(handle.model, "config", None)
    return {
        "model": getattr(config, "_name_or_path", "") or type(handle.model).__name__,
        "model_class": type(handle.model).__name__,
        "family": handle.sites[0].family,
        "task": "training",
        "balance": repr(handle),
    }


def _continue(path: Path, manifest: Manifest) -> None:
    """Make the manifest that of the trace's next session."""
    mine = [m for m in read_manifests(path) if m.rank == 0]
    for other in mine:
        if other.layers != manifest.layers:
            raise TraceError(
                f"{path} cannot be resumed: its layers are not this model's. Choose another name."
            )
    manifest.session, manifest.run = 1 + max(m.session for m in mine), mine[0].run
