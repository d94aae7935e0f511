"""The reference MoE layer: routers, experts, capacity and dispatch.

Every router is called with hidden states [T, D] and gives logits [T, E], routing weights [T, K]
and expert ids [T, K]. The modules:

| module | holds |
|---|---|
| `routers` | `TopKRouter`: a fixed number of experts per token, configured by parts |
| `selection`, `assignment`, `noise` | its parts: group limits, random, Sinkhorn, BASE; noisy logits |
| `variable`, `relu` | expert choice, expert threshold; ReLU with adaptive L1 |
| `table` | hash routing by token id |
| `free` | zero, copy and constant experts; soft MoE |
| `naive_routers` | slow twins of these, loops over tokens |
"""

from equipoise.nn.assignment import Assignment, Sinkhorn
from equipoise.nn.base import Router
from equipoise.nn.free import FreeExperts, SoftMoE
from equipoise.nn.noise import FixedNoise, LearnedNoise
from equipoise.nn.relu import ReLURouter
from equipoise.nn.routers import TopKRouter
from equipoise.nn.selection import GroupLimited, Random, TopK, node_limited
from equipoise.nn.table import HashRouter, hash_table, token_ids
from equipoise.nn.variable import ExpertChoiceRouter, ExpertThresholdRouter, future_leak

__all__ = [
    "Assignment",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "FixedNoise",
    "FreeExperts",
    "GroupLimited",
    "HashRouter",
    "LearnedNoise",
    "Random",
    "ReLURouter",
    "Router",
    "Sinkhorn",
    "SoftMoE",
    "TopK",
    "TopKRouter",
    "future_leak",
    "hash_table",
    "node_limited",
    "token_ids",
]
