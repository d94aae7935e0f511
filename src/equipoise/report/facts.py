"""What a trace says about itself, as label and value: for `info`, and for the page's provenance."""

from __future__ import annotations

from collections import Counter
from typing import Any

from equipoise.report import words
from equipoise.trace import Trace

Facts = list[tuple[str, str]]


def facts(trace: Trace) -> Facts:
    """Label and value of all that is known of how the trace was made; the unknown is left out."""
    meta = trace.meta
    rows = [
        ("trace", str(trace.path) if trace.path else "in memory"),
        ("status", _status(meta)),
        *_of_model(meta),
        ("MoE layers", moe_shape(trace)),
        ("tokens counted", f"{trace.tokens:,}"),
        ("sequences", f"{trace.sequences.num_rows:,}"),
        ("level", _level(meta)),
        *_of_task(meta),
        *_of_run(meta),
    ]
    return [(label, value) for label, value in rows if value]


def moe_shape(trace: Trace) -> str:
    """The MoE layers in one line: "24 (0-23), 32 experts, top-4"; each shape where they differ."""
    if not trace.layers:
        return "none: a dense model"
    numbers = [layer.layer for layer in trace.layers]
    shapes = Counter((layer.experts, layer.top_k) for layer in trace.layers)
    listed = [f"{experts} experts, top-{top_k}" for experts, top_k in shapes]
    if len(shapes) > 1:
        counted = zip(shapes.values(), listed, strict=True)
        listed = [f"{count} of {text}" for count, text in counted]
    return f"{len(numbers)} ({min(numbers)}-{max(numbers)}), " + "; ".join(listed)


def _status(meta: dict[str, Any]) -> str:
    missing = meta.get("missing_ranks")
    text = str(meta.get("status", "complete"))
    if missing:
        text += f"; no files of ranks {words.ids(missing)} of {meta.get('world_size')}"
    return text


def _level(meta: dict[str, Any]) -> str:
    every = meta.get("every", 1)
    rows = "" if every in (None, 1) else f", token rows of one sequence in {every}"
    return f"{meta.get('level', 'counts')}{rows}"


def _of_model(meta: dict[str, Any]) -> Facts:
    parameters = meta.get("parameters")
    return [
        ("model", str(meta.get("model") or "")),
        ("class", str(meta.get("model_class") or "")),
        ("config digest", str(meta.get("config_digest") or "")),
        ("parameters", words.compact(parameters) if parameters else ""),
        ("device", ", ".join(str(meta[key]) for key in ("device", "dtype") if meta.get(key))),
    ]


_TASK_KEYS = ("task", "taxonomy", "data", "split", "splits", "shots", "template", "limit")


def _of_task(meta: dict[str, Any]) -> Facts:
    return [(key, _plain(meta[key])) for key in _TASK_KEYS if meta.get(key) not in (None, "")]


def _of_run(meta: dict[str, Any]) -> Facts:
    times = [str(meta[key]) for key in ("started", "ended") if meta.get(key)]
    speed = meta.get("tokens_per_second")
    peak = meta.get("peak_host_bytes")
    device_peak = meta.get("peak_device_bytes")
    return [
        ("time", " to ".join(times)),
        ("duration", words.duration(meta["seconds"]) if meta.get("seconds") else ""),
        ("speed", f"{speed:,.0f} tokens/s" if speed else ""),
        ("peak memory", words.size(peak) if peak else ""),
        ("peak device memory", words.size(device_peak) if device_peak else ""),
        ("processes", str(meta["world_size"]) if meta.get("world_size", 1) > 1 else ""),
        ("sessions", str(meta["sessions"]) if meta.get("sessions", 1) > 1 else ""),
        ("versions", _plain(meta.get("versions") or "")),
        ("platform", str(meta.get("platform") or "")),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
