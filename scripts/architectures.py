"""Rewrite the table in docs/architectures.md from tiny models: python scripts/architectures.py

Builds each MoE architecture of the installed transformers as the tests do, discovers its routers and
writes what they are. Whether the record is right is the business of tests/models.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "models")]

from tiny import architectures, build, inputs_for, randomise_routing, record  # noqa: E402

from equipoise.errors import RoutingError  # noqa: E402
from equipoise.models import RouterSite, discover  # noqa: E402
from equipoise.models.adapters import adapter_of  # noqa: E402
from equipoise.models.configs import moe_layers  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- table: python scripts/architectures.py -->", "<!-- end of table -->"
HEADS = (
    "architecture | class tested | MoE layers heard/configured | experts | top-k | score function "
    "| selection bias | shared | scores | captured at | remark"
)
REMARKS = {
    "dbrx": "the block selects, its router returns logits only",
    "deepseek_v4": "the first layers choose by a table over token ids: `score_function` is `hash`",
    "diffusion_gemma": "the router returns probabilities as scores",
    "doge": "product keys; routing mixes tokens of a batch; no scores (they would be all pairs)",
    "dots3_note": "the vision tower has routers of its own",
    "ernie4_5_vl_moe": "text and vision routers; rows are split by modality when images are there",
    "gemma4": "the router returns probabilities as scores",
    "gpt_oss": "MXFP4 kernels and `use_kernels=True` are refused: load dequantised",
    "jetmoe": "two routers a layer: attention experts and feed-forward experts",
    "llama4": "experts run on every token, scaled by 0 where not selected",
    "longcat_flash": "zero experts are recorded as no expert",
    "qwen3_omni_moe": "thinker and talker share layer numbers: told apart by path",
    "switch_transformers": "tokens dropped by capacity are recorded as no expert",
    "zaya": "the skip choice is recorded as no expert",
}


def row(arch: str) -> tuple[str, ...]:
    model = build(arch)
    name = type(model).__name__
    try:
        sites = discover(model)
    except RoutingError as error:
        reason = str(error).split(") ", 1)[1].removesuffix(" See docs/architectures.md.")
        return (arch, name, *["-"] * 7, "refused", reason.rstrip("."))
    randomise_routing(model)
    with_scores = all(r.scores_TE is not None for r in record(model, sites, **inputs_for(model)))
    return (
        arch,
        name,
        *described(model, sites),
        "yes" if with_scores else "no",
        *captured(sites, arch),
    )


def described(model: Any, sites: list[RouterSite]) -> list[str]:
    heard = {site.layer for site in sites}
    configured = moe_layers(model.config)
    kinds = list(dict.fromkeys(site.score_function for site in sites))
    site = sites[-1]
    nulls = f" + {site.null_experts}" if site.null_experts else ""
    return [
        f"{len(heard)}/{len(heard if configured is None else configured)}",
        f"{site.num_experts}{nulls}",
        str(site.top_k),
        ", ".join(kinds),
        "yes" if any(site.selection_bias for site in sites) else "no",
        str(max(site.shared_experts for site in sites)),
    ]


def captured(sites: list[RouterSite], arch: str) -> tuple[str, str]:
    adapter = adapter_of(sites[0].module)
    how = f"adapter `{adapter.__name__}`" if adapter is not None else "call of the experts"
    return how, REMARKS.get(arch, "")


def main() -> None:
    rows = [row(arch) for arch in architectures()]
    columns = HEADS.count("|") + 1
    lines = [f"| {HEADS} |", "|" + "---|" * columns, *("| " + " | ".join(r) + " |" for r in rows)]
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(before + "\n".join([BEGIN, "", *lines, "", END]) + after, encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)} ({len(rows)} architectures).")


if __name__ == "__main__":
    main()
