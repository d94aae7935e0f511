"""What the manifests of a trace's parts say together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equipoise.trace.schema import Manifest


def merged(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Provenance of the whole run; complete when every rank's last session is."""
    first = manifests[0]
    last = {m.rank: m.status for m in manifests}
    missing = _missing_ranks(manifests)
    complete = set(last.values()) == {"complete"} and not missing
    return {
        **first.meta,
        "level": first.level,
        "every": first.every,
        "status": "complete" if complete else "partial",
        "missing_ranks": missing,
        "window_tokens": first.window_tokens,
        "world_size": first.world_size,
        "sessions": 1 + max(m.session for m in manifests),
        **(_merge_figures(manifests) if len(manifests) > 1 else {}),
    }


def _missing_ranks(manifests: Sequence[Manifest]) -> list[int]:
    have = {m.rank for m in manifests}
    return [rank for rank in range(manifests[0].world_size) if rank not in have]


def _merge_figures(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Sessions of a rank follow each other, ranks run side by side."""
    merged: dict[str, Any] = {}
    metas = [m.meta for m in manifests]
    for key, combine in (
        ("recorded_tokens", sum),
        ("peak_host_bytes", max),
        ("peak_device_bytes", max),
        ("started", min),
        ("ended", max),
    ):
        values = [meta[key] for meta in metas if meta.get(key) is not None]
        if values:
            merged[key] = combine(values)
    speeds = []
    for rank in {m.rank for m in manifests if m.rank == m.data_rank}:
        mine = [m.meta for m in manifests if m.rank == rank and m.meta.get("seconds")]
        seconds = sum(meta["seconds"] for meta in mine)
        if seconds:
            speeds.append(sum(meta["recorded_tokens"] for meta in mine) / seconds)
            merged["seconds"] = max(seconds, merged.get("seconds", 0.0))
    if speeds:
        merged["tokens_per_second"] = round(sum(speeds), 1)
    return merged
