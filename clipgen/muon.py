"""Implement Muon: momentum, orthogonalized by Newton-Schulz iterations of many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from clipgen.processor import has_bf16_units

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LR_ADJUSTMENTS = ("original", "match_rms_adamw")
# Elements iterated together: larger stacks need more memory and are no faster
MAX_ELEMENTS = 2**26


class Muon(Optimizer):
    """Step along orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Computes the update of ``torch.optim.Muon`` and keeps its state, so that each loads the other's checkpoints, but

    - iterates in float32 on devices without bfloat16 units, where ``torch.optim.Muon`` is many times slower;
    - iterates all matrices of one shape together, and on a GPU by torch.compile;
    - divides the matrices among the processes of ``torch.distributed``: each orthogonalizes its share. Under DDP the
      results travel in one collective operation per step; under FSDP2 (parameters are DTensors, sharded by rows) the
      rows travel to the matrix's process in one, and back in another.

    All processes must step the same parameters, under DDP with the same gradients.

    Args:
        params: matrices, or parameter groups of them.
        lr, weight_decay, momentum, nesterov: see ``torch.optim.Muon``.
        ns_coefficients, ns_steps, eps: of the Newton-Schulz iteration.
        adjust_lr_fn: ``"original"`` or ``"match_rms_adamw"`` (arXiv:2502.16982): scale the step by the matrix's shape.
        dtype: of the iteration; None: bfloat16 where the device has units for it, else float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if adjust_lr_fn not in (None, *LR_ADJUSTMENTS):
            raise ValueError(f"adjust_lr_fn must be one of {', '.join(LR_ADJUSTMENTS)}, got {adjust_lr_fn!r}")
        # The keys of torch.optim.Muon's groups, which checkpoints hold; the dtype belongs to the device
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        super().__init__(params, defaults)
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"parameters of Muon must be matrices, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = self._directions(parameters, group)
        dtype = self.dtype or native_dtype(directions[0].device)
        updates = orthogonalize_distributed(
            parameters,
            [direction.to(dtype) for direction in directions],
            tuple(group["ns_coefficients"]),
            group["ns_steps"],
            group["eps"],
        )
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for shape in dict.fromkeys(p.shape for p in parameters):
            members = [i for i, p in enumerate(parameters) if p.shape == shape]
            torch._foreach_add_(
                [weights[i] for i in members],
                [updates[i] for i in members],
                alpha=-adjusted_lr(group["lr"], group["adjust_lr_fn"], shape),
            )

    def _directions(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Update the momentum, and return what is orthogonalized; of a DTensor this process's rows."""
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)  # type: ignore[arg-type]
        gradients = [local(p.grad) for p in parameters]  # type: ignore[arg-type]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        return list(torch._foreach_lerp(gradients, buffers, group["momentum"])) if group["nesterov"] else buffers


def native_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which a device multiplies matrices fastest, of bfloat16 and float32."""
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


def adjusted_lr(lr: float, kind: str | None, shape: Sequence[int]) -> float:
    """Return the learning rate of a matrix (rows, columns)."""
    rows, columns = shape
    if kind == "match_rms_adamw":
        return 0.2 * lr * math.sqrt(max(rows, columns))
    return lr * math.sqrt(max(1, rows / columns))


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a DTensor, or a plain tensor itself; in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------------ orthogonalize


def newton_schulz(x: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices (N, rows, columns), rows <= columns, to between 0.7 and 1.2.

    Each step is ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``.
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@cache
def iteration(device_type: str) -> Callable[..., Tensor]:
    """Return the iteration as a device runs it fastest; torch.compile is imported when it is first needed."""
    return torch.compile(newton_schulz, dynamic=False) if device_type == "cuda" else newton_schulz


def orthogonalize(
    matrices: list[Tensor],
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """Orthogonalize matrices of any shapes; those of one shape, or of its transpose, are iterated together."""
    # The smaller Gram matrix is that of the rows of a wide matrix
    wide = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]
    results: list[Any] = [None] * len(matrices)
    for members in stacks(wide):
        stack = torch.stack([wide[i] for i in members])
        for i, result in zip(members, iteration(stack.device.type)(stack, coefficients, steps, eps)):
            results[i] = result.mT if wide[i] is not matrices[i] else result
    return results


def stacks(matrices: list[Tensor]) -> list[list[int]]:
    """Return the numbers of matrices that are iterated together: of one shape, and ``MAX_ELEMENTS`` at most."""
    by_shape: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    found = []
    for shape, members in by_shape.items():
        most = max(MAX_ELEMENTS // shape.numel(), 1)
        found += [members[start : start + most] for start in range(0, len(members), most)]
    return found


def orthogonalize_distributed(
    parameters: list[Tensor],
    matrices: list[Tensor],
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """Orthogonalize the parameters' matrices, each in one of the processes that hold them.

    Args:
        parameters: tell the shapes, and how the matrices are distributed.
        matrices: of a DTensor this process's rows, and so are the results.
    """
    options = coefficients, steps, eps
    if isinstance(parameters[0], DTensor):
        return orthogonalize_rows(parameters, matrices, *options)  # type: ignore[arg-type]
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return orthogonalize(matrices, *options)
    owners = owners_of(parameters, dist.get_world_size())
    mine = [i for i, owner in enumerate(owners) if owner == dist.get_rank()]
    return share(matrices, owners, orthogonalize([matrices[i] for i in mine], *options))


def owners_of(parameters: Sequence[Tensor], world_size: int) -> list[int]:
    """Return the process that orthogonalizes each matrix: equal shapes in turn, so that all have as much to do."""
    order = sorted(range(len(parameters)), key=lambda i: sorted(parameters[i].shape))
    owners = [0] * len(parameters)
    for place, i in enumerate(order):
        owners[i] = place % world_size
    return owners


def share(matrices: list[Tensor], owners: list[int], results: list[Tensor]) -> list[Tensor]:
    """Return the results of all processes, given this process's own, by one collective operation.

    Args:
        matrices: tell the shapes of the results.
    """
    world_size = dist.get_world_size()
    counts = [sum(m.numel() for m, owner in zip(matrices, owners) if owner == rank) for rank in range(world_size)]
    sent = matrices[0].new_zeros(max(counts))
    if results:
        sent[: counts[dist.get_rank()]] = torch.cat([result.flatten() for result in results])
    received = sent.new_empty(world_size * len(sent))
    # As bytes: not every backend knows bfloat16
    dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8))
    parts = list(received.view(world_size, -1))
    found = []
    for matrix, owner in zip(matrices, owners):
        found.append(parts[owner][: matrix.numel()].view(matrix.shape))
        parts[owner] = parts[owner][matrix.numel() :]
    return found


# --------------------------------------------------------------------------------------------------------- sharded rows


def orthogonalize_rows(
    parameters: list[DTensor],
    rows: list[Tensor],
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """Orthogonalize matrices whose rows are distributed (FSDP2): rows travel to the matrix's process, and back."""
    mesh = parameters[0].device_mesh
    for p in parameters:
        if p.device_mesh != mesh or tuple(p.placements) != (Shard(0),):
            raise ValueError(f"parameters of Muon must be sharded by rows over one mesh, got {p.placements}")
    world_size, rank = mesh.size(), mesh.get_local_rank()
    owners = owners_of(parameters, world_size)
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    there = [[i for i, owner in enumerate(owners) if owner == other] for other in range(world_size)]
    heights = [[height(parameters[i], other, world_size) for i in mine] for other in range(world_size)]
    shapes = [[(h, parameters[i].shape[1]) for h, i in zip(heights[other], mine)] for other in range(world_size)]

    received = exchange([[rows[i] for i in numbers] for numbers in there], shapes, rows[0], mesh.get_group())
    complete = [torch.cat(parts) for parts in zip(*received)]
    results = orthogonalize(complete, coefficients, steps, eps)
    pieces = [result.split([heights[other][k] for other in range(world_size)]) for k, result in enumerate(results)]
    sent = [[piece[other] for piece in pieces] for other in range(world_size)]
    own_shapes = [[tuple(rows[i].shape) for i in numbers] for numbers in there]
    returned = exchange(sent, own_shapes, rows[0], mesh.get_group())

    found: list[Any] = [None] * len(rows)
    for numbers, parts in zip(there, returned):
        for i, part in zip(numbers, parts):
            found[i] = part
    return found


def height(parameter: DTensor, rank: int, world_size: int) -> int:
    """Return the number of a matrix's rows that a process holds, as ``torch.chunk`` divides them."""
    rows = parameter.shape[0]
    chunk = -(-rows // world_size)
    return min(max(rows - rank * chunk, 0), chunk)


def exchange(
    sent: list[list[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Send tensors to each process, and return those of ``shapes`` from each, by one collective operation.

    Args:
        like: tells dtype and device, which all tensors share.
    """
    counts = [[math.prod(shape) for shape in some] for some in shapes]
    outgoing = torch.cat([tensor.flatten() for tensors in sent for tensor in tensors] or [like.new_empty(0)])
    incoming = like.new_empty(sum(sum(some) for some in counts))
    # As bytes: not every backend knows bfloat16
    dist.all_to_all_single(
        incoming.view(torch.uint8),
        outgoing.view(torch.uint8),
        [like.itemsize * sum(some) for some in counts],
        [like.itemsize * sum(tensor.numel() for tensor in tensors) for tensors in sent],
        group=group,
    )
    parts = iter(incoming.split([count for some in counts for count in some]))
    return [[next(parts).view(shape) for shape in some] for some in shapes]
