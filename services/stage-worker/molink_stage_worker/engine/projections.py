"""Matrix products of a layer: plain, or with weights laid out once for the CPU's kernels.

oneDNN's matrix kernels want the weights in blocks of their own. Given a plain matrix they rearrange it at every
call, which for a few tokens costs as much as the product itself; so on a CPU the weights are rearranged once
and the plain ones dropped. It also folds what follows into the product: the activation, the factor, the
residual, each rounded once instead of twice. Where the processor multiplies bfloat16 pair by pair, loops of our
own take its place.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from molink_stage_worker.engine.bf16_unit import MOST_ROWS, laid_out, may_share, memory_of, product
from molink_stage_worker.engine.product_ends import Then

_NO_BIAS = np.empty(0, np.float32)
_BATCH_HINT = 16
"""oneDNN chooses the blocks for a number of rows; any number works afterwards."""


class Projection(Protocol):
    """A matrix product, and the product together with what follows it."""

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``x W^T + b``, T × O."""

    def with_silu(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``silu(x W^T + b)``."""

    def times(self, x_TI: torch.Tensor, factor_TO: torch.Tensor) -> torch.Tensor:
        """``(x W^T + b) * factor``."""

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """``x W^T + b + residual``."""


class PlainProjection(nn.Module):
    """Any device, any dtype."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Projection.__call__`."""
        return functional.linear(x_TI, self.weight, self.bias)

    def with_silu(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Projection.with_silu`."""
        return functional.silu(self(x_TI), inplace=True)

    def times(self, x_TI: torch.Tensor, factor_TO: torch.Tensor) -> torch.Tensor:
        """See `Projection.times`."""
        return self(x_TI).mul_(factor_TO)  # type: ignore[no-any-return]

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """See `Projection.plus`."""
        return self(x_TI).add_(residual_TO)  # type: ignore[no-any-return]


class PackedProjection(nn.Module):
    """Its weights lie in a way that only its own kind of product reads: neither a parameter nor a buffer."""

    packed_bytes: int
    num_outputs: int
    bias: Any
    """In float32; empty if there is none."""
    in_blocks: Any
    """The weights for the loops of `bf16_unit`; None where those cannot be used."""

    def __init__(self, num_outputs: int, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.bias = _NO_BIAS if bias_O is None else bias_O.detach().float().numpy().copy()

    def _in_loops(self, x_TI: torch.Tensor, then: Then = Then.NOTHING, other_TO: Any = None) -> torch.Tensor:
        """A product and what follows, by `in_blocks`; any leading shape."""
        shape, rows = x_TI.shape[:-1], x_TI.numel() // x_TI.shape[-1]
        out_TO = x_TI.new_empty(rows, self.num_outputs)
        if rows:
            product(x_TI.reshape(rows, -1).contiguous(), self.in_blocks, self.bias, out_TO, then, other_TO)
        return out_TO.view(*shape, self.num_outputs)


class LoopProjection(PackedProjection):
    """bfloat16 on a CPU with dot products of pairs. Input may have any leading shape."""

    def __init__(self, numbers: Any, num_outputs: int, bias_O: torch.Tensor | None) -> None:
        """`numbers` are those of `bf16_unit.laid_out`."""
        super().__init__(num_outputs, bias_O)
        self.in_blocks = numbers
        self.packed_bytes = numbers.nbytes

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Projection.__call__`."""
        return self._in_loops(x_TI)

    def with_silu(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Projection.with_silu`."""
        return self._in_loops(x_TI, Then.SILU)

    def times(self, x_TI: torch.Tensor, factor_TO: torch.Tensor) -> torch.Tensor:
        """See `Projection.times`."""
        return self._in_loops(x_TI, Then.TIMES, factor_TO.contiguous())

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """See `Projection.plus`."""
        return self._in_loops(x_TI, Then.PLUS, residual_TO.contiguous())


class OneDnnProjection(PackedProjection):
    """On a CPU with oneDNN: float32, and bfloat16 where the CPU computes it. Input may have any leading shape."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__(weight_OI.shape[0], bias_O)
        self.packed_bytes = weight_OI.numel() * weight_OI.element_size()
        with _one_thread():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _BATCH_HINT)
        self._bias = None if bias_O is None else bias_O.detach().clone()
        self.in_blocks = memory_of(self._packed, weight_OI) if weight_OI.dtype is torch.bfloat16 else None
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._run_binary = torch.ops.mkldnn._linear_pointwise.binary

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Projection.__call__`."""
        rows = x_TI.numel() // x_TI.shape[-1]
        if self.in_blocks is not None and 0 < rows <= MOST_ROWS and may_share():
            return self._in_loops(x_TI)
        return self._run(x_TI, self._packed, self._bias, "none", [], "")  # type: ignore[no-any-return]

    def with_silu(self, x_TI: torch.Tensor) -> torch.Tensor:
        """See `Projection.with_silu`."""
        return self._run(x_TI, self._packed, self._bias, "swish", [], "")  # type: ignore[no-any-return]

    def times(self, x_TI: torch.Tensor, factor_TO: torch.Tensor) -> torch.Tensor:
        """See `Projection.times`."""
        return self._run_binary(x_TI, factor_TO, self._packed, self._bias, "mul")  # type: ignore[no-any-return]

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """See `Projection.plus`."""
        return self._run_binary(x_TI, residual_TO, self._packed, self._bias, "add")  # type: ignore[no-any-return]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For more threads oneDNN may choose blocks that the loops do not know. It computes with any of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN computes this dtype here natively."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def project(*linears: nn.Linear) -> PlainProjection | OneDnnProjection | LoopProjection:
    """One projection whose outputs are those of `linears`, one after the other. The best kind for their place."""
    weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    return projection_of(weight.detach(), None if bias is None else bias.detach())


def projection_of(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> PlainProjection | OneDnnProjection | LoopProjection:
    """The best kind for where the weights are."""
    if not can_pack(weight_OI.dtype, weight_OI.device):
        return PlainProjection(weight_OI, bias_O)
    numbers = laid_out(weight_OI) if weight_OI.dtype is torch.bfloat16 else None
    if numbers is None:
        return OneDnnProjection(weight_OI, bias_O)
    return LoopProjection(numbers, len(weight_OI), bias_O)
