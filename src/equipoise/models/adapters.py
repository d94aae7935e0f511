"""Architectures that the generic route does not fit, one function each, and those refused.

An adapter builds the site for one module, found by its class name. It hears what the model hands
to its experts wherever that passes a module boundary; where it has to compute ids from logits
(llama4), it does what the model does, on the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.errors import RoutingError
from equipoise.models import experts
from equipoise.models.scan import Scan, class_names
from equipoise.models.sites import RouterSite
from equipoise.models.taps import Hear
from equipoise.routing import NO_EXPERT

Adapter = Callable[[Scan, str, Any], RouterSite]


def llama4(scan: Scan, path: str, router: Any) -> RouterSite:
    """All experts run on all tokens, scaled by 0 where not selected; the router knows which."""
    top_k = int(router.top_k)

    def install(hear: Hear, scores: bool) -> list[RemovableHandle]:
        def at_router(_m: nn.Module, _a: Any, output: tuple[Tensor, Tensor]) -> Any:
            weights_TE, logits_TE = output
            # Those not selected got the weight sigmoid(-inf) = 0.
            ids = torch.topk(weights_TE.detach(), top_k, dim=1).indices
            weights = weights_TE.gather(1, ids)
            _, carried = hear(ids, weights, logits_TE)
            if carried is weights or carried is None:
                return None
            return weights_TE.scatter(1, ids, carried), logits_TE

        return [router.register_forward_hook(at_router)]

    return experts.describe_site(scan, path, module=router, router=router, ears=install)


def jetmoe(scan: Scan, path: str, router: Any) -> RouterSite:
    """Two routers in a layer, for attention and feed-forward; each gives its dispatch order."""
    num_experts, top_k = int(router.num_experts), int(router.top_k)

    def install(hear: Hear, scores: bool) -> list[RemovableHandle]:
        def at_router(_m: nn.Module, _a: Any, output: Any) -> Any:
            order, batch, gates, sizes, logits_TE = output
            of_slot = torch.arange(num_experts, device=order.device).repeat_interleave(
                torch.tensor(sizes, device=order.device), output_size=order.numel()
            )
            ids = torch.empty_like(order).scatter_(0, order, of_slot)
            weights = torch.zeros_like(gates).scatter(0, order, gates).view(-1, top_k)
            _, carried = hear(ids.view(-1, top_k), weights, logits_TE)
            if carried is weights or carried is None:
                return None
            return order, batch, carried.reshape(-1).gather(0, order), sizes, logits_TE

        return [router.register_forward_hook(at_router)]

    return experts.describe_site(scan, path, module=router, router=router, ears=install)


def doge(scan: Scan, path: str, block: Any) -> RouterSite:
    """Product keys: an expert is a pair of keys, heard where its embedding row is looked up."""
    num_keys = int(block.num_keys)

    def install(hear: Hear, scores: bool) -> list[RemovableHandle]:
        heard: list[Tensor] = []

        def at_lookup(_: nn.Module, args: tuple[Tensor]) -> None:
            heard[:] = args

        def at_block(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            ids, logits_2TN = heard.pop(), output[1]
            selected = logits_2TN[0].gather(1, ids // num_keys) + logits_2TN[1].gather(
                1, ids % num_keys
            )
            weights = torch.softmax(selected, dim=-1)
            if block.norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            hear(ids, weights, None)

        lookup = block.down_embed
        return [lookup.register_forward_pre_hook(at_lookup), block.register_forward_hook(at_block)]

    site = experts.describe_site(scan, path, module=block, router=None, ears=install, block=path)
    return replace(site, shared_experts=1)


def switch(scan: Scan, path: str, module: Any) -> RouterSite:
    """One expert a token, as a one-hot row, all zero where the expert's capacity was used up."""
    router = scan.router_beside(path)
    num_experts = int(module.num_experts)

    def ids_of(mask_T1E: Tensor) -> Tensor:
        return mask_T1E.argmax(dim=-1).masked_fill(mask_T1E.sum(dim=-1) == 0, NO_EXPERT)

    ears = experts.ears(
        module, router, num_experts, ("selected_experts", "routing_weights"), read=ids_of
    )
    return experts.describe_site(scan, path, module=module, router=router, ears=ears, top_k=1)


def zaya(scan: Scan, path: str, module: Any) -> RouterSite:
    """The router may choose to skip; the model then passes expert 0 with weight 0."""

    def skipped(ids: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        return ids.masked_fill(weights == 0, NO_EXPERT)

    site = experts.site(scan, path, module, null_experts=1)
    return replace(site, interpret=skipped)


def longcat_flash(scan: Scan, path: str, module: Any) -> RouterSite:
    """Ids from the number of routed experts up are zero experts, which return their input."""
    return experts.site(scan, path, module, null_experts=int(module.zero_expert_num))


def torchtitan(scan: Scan, path: str, module: Any) -> RouterSite:
    """torchtitan's MoE layer: scores come after the score function, the bias lies in the block."""
    router = scan.router_beside(path)
    num_experts = int(module.inner_experts.num_experts)
    ears = experts.ears(module, router, num_experts, ("topk_expert_ids_BLK", "topk_scores_BLK"))
    site = experts.describe_site(
        scan, path, module=module, router=router, ears=ears, num_experts=num_experts
    )
    return replace(
        site, score_function=str(getattr(router, "score_func", "unknown")), scores_are="gates"
    )


ADAPTERS: dict[str, Adapter] = {
    "Llama4Router": llama4,
    "JetMoeTopKGating": jetmoe,
    "DogeCDMoE": doge,
    "SwitchTransformersExperts": switch,
    "ZayaExperts": zaya,
    "LongcatFlashExperts": longcat_flash,
    "RoutedExperts": torchtitan,
}
"""By class name of the module that the adapter is given."""

REFUSED = {
    "NllbMoeSparseMLP": (
        "the experts do not run what the router says: transformers hands them a one-hot mask "
        "where ids are expected, so that only experts 0 and 1 ever run"
    ),
    "SoftMoE": "every expert works on mixtures of all tokens: nothing is selected",
    "VitPoseBackboneMoeMLP": "its experts are chosen by dataset_index, not by a router for tokens",
}
"""Class name of a block, and why its routing cannot be recorded."""


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for a module's class or a class that it comes from."""
    return next((ADAPTERS[name] for name in class_names(module) if name in ADAPTERS), None)


def refuse_by_name(scan: Scan) -> None:
    """Raise RoutingError for architectures that route, but not in a way that can be recorded."""
    for path, module in scan.modules.items():
        for name in class_names(module) & REFUSED.keys():
            raise RoutingError(
                f"{scan.family} cannot be recorded: at {path} ({name}) {REFUSED[name]}. "
                "See docs/architectures.md."
            )
