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
| `layer` | `MoELayer`: router, experts, shared experts, capacity, expert parallelism |
| `experts`, `grouped`, `dispatch` | stacked experts on grouped GEMM; tokens to rows and back |
| `capacity`, `limiter` | what overflows an expert's capacity, and what becomes of it |
| `parallel` | experts shared out over a process group, by all-to-all |
| `naive`, `naive_routers` | slow twins of these, loops over tokens |
"""

from equipoise.nn.assignment import Assignment, Sinkhorn
from equipoise.nn.base import Router
from equipoise.nn.capacity import Limited, limit
from equipoise.nn.experts import Experts
from equipoise.nn.free import FreeExperts, SoftMoE
from equipoise.nn.layer import MoELayer
from equipoise.nn.limiter import Capacity, Limiter
from equipoise.nn.noise import FixedNoise, LearnedNoise
from equipoise.nn.parallel import ParallelExperts
from equipoise.nn.relu import ReLURouter
from equipoise.nn.routers import TopKRouter
from equipoise.nn.selection import GroupLimited, Random, TopK, node_limited
from equipoise.nn.table import HashRouter, hash_table, token_ids
from equipoise.nn.variable import ExpertChoiceRouter, ExpertThresholdRouter, future_leak

__all__ = [
    "Assignment",
    "Capacity",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "Experts",
    "FixedNoise",
    "FreeExperts",
    "GroupLimited",
    "HashRouter",
    "LearnedNoise",
    "Limited",
    "Limiter",
    "MoELayer",
    "ParallelExperts",
    "Random",
    "ReLURouter",
    "Router",
    "Sinkhorn",
    "SoftMoE",
    "TopK",
    "TopKRouter",
    "future_leak",
    "hash_table",
    "limit",
    "node_limited",
    "token_ids",
]
