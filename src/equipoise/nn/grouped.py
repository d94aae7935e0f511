"""One matrix per expert, applied to that expert's rows: torch's grouped product, and a loop.

R rows sorted by expert, I inputs, O outputs; `ends_E[e]` is the row after expert e's last.
`F.grouped_mm` takes no float64, no rows of a length that is no multiple of 16 bytes, and under
torch.compile only bfloat16; an operator of our own, a loop over experts, does what it cannot.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 16  # bytes


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """rows @ weight[e].T for the rows of each expert e, [R, O].

    Rows from ends_E[-1] on are nobody's: what stands there afterwards is undefined (gradients too).
    """
    if can_group(rows_RI, weight_EOI):
        return F.grouped_mm(rows_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    result: Tensor = torch.ops.equipoise.grouped_loop(rows_RI, weight_EOI, ends_E)
    return result


def linear_dtype(weight: Tensor) -> torch.dtype:
    """What nn.Linear would compute a product with `weight` in: autocast's type where it is on, or its own.

    torch's autocast knows neither grouped products nor those within functions of our own.
    """
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def grouped_dtype(weight_EOI: Tensor) -> torch.dtype:
    """What grouped products are computed in: as nn.Linear's, but on a CPU in the type of the weights.

    There torch compiles a kernel in bfloat16 for every number of rows, which takes longer than it saves.
    """
    return weight_EOI.dtype if weight_EOI.device.type == "cpu" else linear_dtype(weight_EOI)


def batched_linear(rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
    """The same where every expert has R / E rows: one batched product, shapes known beforehand."""
    rows_ECI = rows_RI.view(len(weight_EOI), -1, rows_RI.shape[1])
    with torch.autocast(rows_RI.device.type, enabled=False):  # in the type that they are given
        outputs_ECO = torch.bmm(rows_ECI, weight_EOI.transpose(1, 2))
    return outputs_ECO.flatten(0, 1)


def can_group(rows_RI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these, forward and backward."""
    dtype, device = weight_EOI.dtype, weight_EOI.device
    if not hasattr(F, "grouped_mm") or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(size * dtype.itemsize % _ALIGNED for size in weight_EOI.shape[1:]) or len(rows_RI) == 0:
        return False
    if torch.compiler.is_compiling():
        return dtype == torch.bfloat16
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Memory-mapped weights may begin anywhere.
    return weight_EOI.data_ptr() % _ALIGNED == 0 and rows_RI.data_ptr() % _ALIGNED == 0


@torch.library.custom_op(
    "equipoise::grouped_loop",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor ends) -> Tensor",
)
def _loop(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    out_RO = rows_RI.new_zeros(len(rows_RI), weight_EOI.shape[1])
    begin = 0
    with torch.autocast(rows_RI.device.type, enabled=False):
        for weight_OI, end in zip(weight_EOI, ends_E.tolist(), strict=True):
            if end > begin:
                torch.mm(rows_RI[begin:end], weight_OI.t(), out=out_RO[begin:end])
            begin = end
    return out_RO


@torch.library.custom_op(
    "equipoise::grouped_loop_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor weight, Tensor ends) -> (Tensor, Tensor)",
)
def _loop_backward(
    grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_rows_RI = torch.zeros_like(rows_RI, memory_format=torch.contiguous_format)
    grad_weight_EOI = torch.zeros_like(weight_EOI, memory_format=torch.contiguous_format)
    begin = 0
    with torch.autocast(rows_RI.device.type, enabled=False):
        for expert, end in enumerate(ends_E.tolist()):
            if end > begin:
                at = slice(begin, end)
                torch.mm(grad_RO[at], weight_EOI[expert], out=grad_rows_RI[at])
                torch.mm(grad_RO[at].t(), rows_RI[at], out=grad_weight_EOI[expert])
            begin = end
    return grad_rows_RI, grad_weight_EOI


def _shape(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])


def _shapes(
    grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    return rows_RI.new_empty(rows_RI.shape), weight_EOI.new_empty(weight_EOI.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.equipoise.grouped_loop_backward(grad_RO, *ctx.saved_tensors), None


_loop.register_fake(_shape)
_loop_backward.register_fake(_shapes)
_loop.register_autograd(_backward, setup_context=_keep)
