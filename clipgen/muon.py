"""The Muon optimizer: momentum, orthogonalized by Newton-Schulz iterations of many matrices at once.

Ours although ``torch.optim.Muon`` exists, for the reasons given in ``Muon``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from clipgen.hardware.device import should_compile
from clipgen.hardware.processor import has_bf16_units
from clipgen.storage.files import one_line

logger = logging.getLogger(__name__)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LR_ADJUSTMENTS = ("original", "match_rms_adamw")
# Elements per stack of matrices. Larger stacks need more memory and are not faster.
MAX_ELEMENTS = 2**26
# Ratio of columns to rows from which a matrix is iterated by its Gram matrix.
MIN_GRAM_RATIO = 2
# Steps after which the Gram matrix is computed from X again, which keeps rounding errors about as small as in the
# usual iteration, in float32 and bfloat16.
GRAM_STEPS = 3


class Muon(Optimizer):
    """Step along orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Computes the update of ``torch.optim.Muon`` and keeps its state, so that each loads the other's checkpoints, but

    - iterates in float32 on devices without bfloat16 units, where ``torch.optim.Muon`` is many times slower;
    - iterates all matrices of one shape together, on a GPU by torch.compile if it works there, and wide ones by their
      Gram matrices;
    - distributes the matrices over the ranks, each of which orthogonalizes its share. Under DDP one collective
      operation per step exchanges the results. Under FSDP2 (parameters are DTensors, sharded by rows) one collective
      operation sends all rows of a matrix to its owner, and another one sends the results back;
    - skips a step exactly if ``found_inf`` is 1, as torch's fused optimizers do (see ``step``).

    All ranks must step the same parameters, under DDP with the same gradients.

    Args:
        params: matrices, or parameter groups of them.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: decay of the momentum.
        nesterov: use Nesterov momentum.
        ns_coefficients: coefficients of the Newton-Schulz iteration.
        eps: lower bound of the norm that a matrix is divided by before the iteration.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: scaling of the learning rate by the matrix's shape, ``"original"`` or ``"match_rms_adamw"``
            (arXiv:2502.16982).
        dtype: dtype of the iteration; None uses bfloat16 if the device multiplies fast in it, else float32.
    """

    # 1 (on the parameters' device) to skip the next steps, 0 or None to take them.
    found_inf: Tensor | None = None

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
        # The keys of torch.optim.Muon's groups, which checkpoints contain. The dtype depends on the device instead.
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
        """Update the parameters that have a gradient.

        If ``found_inf`` is 1, neither weights nor momentum change, regardless of the gradients. Its value is not read
        by the host, which would synchronize with a GPU.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = self._update_momentum(parameters, group)
        dtype = self.dtype or native_dtype(directions[0].device)
        updates = orthogonalize_distributed(
            parameters,
            [direction.to(dtype) for direction in directions],
            tuple(group["ns_coefficients"]),
            group["ns_steps"],
            group["eps"],
        )
        weights = list(map(local_rows, parameters))
        decay: Any = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            decay = torch.where(self.found_inf > 0, 1.0, decay)
            torch._foreach_mul_(updates, 1 - self.found_inf)
        torch._foreach_mul_(weights, decay)
        for shape, members in indices_by_shape(parameters).items():
            torch._foreach_add_(
                select(weights, members),
                select(updates, members),
                alpha=-adjusted_lr(group["lr"], group["adjust_lr_fn"], shape),
            )

    def _update_momentum(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Update the momentum and return the matrices to orthogonalize (of DTensors, this rank's rows)."""
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)  # type: ignore[arg-type]
        gradients = [local_rows(p.grad) for p in parameters]  # type: ignore[arg-type]
        buffers = [local_rows(self.state[p]["momentum_buffer"]) for p in parameters]
        if self.found_inf is not None:
            # A buffer that moves towards itself does not change, and its orthogonalization stays finite.
            skip = self.found_inf > 0
            gradients = [torch.where(skip, buffer, gradient) for buffer, gradient in zip(buffers, gradients)]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        return list(torch._foreach_lerp(gradients, buffers, group["momentum"])) if group["nesterov"] else buffers


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if a device multiplies matrices faster in it than in float32, else float32."""
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


def adjusted_lr(lr: float, adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    """Return the learning rate of a matrix (rows, columns)."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * lr * math.sqrt(max(rows, columns))
    return lr * math.sqrt(max(1, rows / columns))


def local_rows(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a DTensor, or a plain tensor itself, without copying."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------------------------------ orthogonalize


def newton_schulz(x: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Move the singular values of matrices (N, rows, columns), rows <= columns, to between about 0.7 and 1.2.

    Each step is ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``.
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    if x.shape[-1] >= MIN_GRAM_RATIO * x.shape[-2]:
        return newton_schulz_by_gram(x, coefficients, steps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def newton_schulz_by_gram(x: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """Compute the iteration of ``newton_schulz`` with fewer operations, for much wider matrices (N, rows, columns).

    A step multiplies X by the polynomial ``P = a I + b A + c A^2``, which commutes with A. So the next Gram matrix is
    ``P A P``, and X itself is needed only once every ``GRAM_STEPS``: all other products are of small square matrices.
    """
    while steps > 0:
        steps_now = min(steps, GRAM_STEPS)
        x = product_of_polynomials(x @ x.mT, coefficients, steps_now) @ x
        steps -= steps_now
    return x


def product_of_polynomials(gram: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """Return the product of the polynomials P of some steps, for the Gram matrices (N, rows, rows) before them."""
    a, b, c = coefficients
    # The polynomial without a I, which ``beta`` adds to each of its products.
    rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    product = rest + a * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(steps - 1):
        half = torch.baddbmm(gram, rest, gram, beta=a)
        gram = torch.baddbmm(half, half, rest, beta=a)
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, product, rest, beta=a)
    return product


@cache
def iteration(device_type: str) -> Callable[..., Tensor]:
    """Return the iteration, on a GPU compiled by torch.compile (which is imported when it is first needed)."""
    return compiled_iteration() if should_compile("auto", torch.device(device_type)) else newton_schulz


def compiled_iteration() -> Callable[..., Tensor]:
    """Return the iteration, compiled when it is first called; as soon as that fails, it is no longer compiled."""
    compiled: Callable[..., Tensor] | None = None

    def iterate(*arguments: Any) -> Tensor:
        nonlocal compiled
        if compiled is not newton_schulz:
            try:
                compiled = compiled or torch.compile(newton_schulz, dynamic=False)
                return compiled(*arguments)
            except Exception as error:  # torch.compile, Triton and C compilers raise many types
                logger.warning("Muon iterates uncompiled, because torch.compile failed: %s", one_line(error))
                compiled = newton_schulz
        return newton_schulz(*arguments)

    return iterate


def orthogonalize(
    matrices: list[Tensor],
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """Orthogonalize matrices of any shapes. Those of one shape, or of its transpose, are iterated together."""
    # A wide matrix has the smaller Gram matrix.
    wide = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]
    results: list[Any] = [None] * len(matrices)
    for members in group_by_shape(wide):
        stack = torch.stack(select(wide, members))
        orthogonal = iteration(stack.device.type)(stack, coefficients, steps, eps)
        for i, result in zip(members, orthogonal):
            results[i] = result.mT if wide[i] is not matrices[i] else result
    return results


def select(tensors: Sequence[Tensor], indices: Iterable[int]) -> list[Tensor]:
    """Return the tensors at some indices."""
    return [tensors[i] for i in indices]


def indices_by_shape(tensors: Sequence[Tensor]) -> dict[torch.Size, list[int]]:
    """Return the indices of the tensors of each shape."""
    indices: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        indices.setdefault(tensor.shape, []).append(i)
    return indices


def group_by_shape(matrices: list[Tensor]) -> list[list[int]]:
    """Return the indices of matrices to iterate together: of one shape, with at most ``MAX_ELEMENTS`` elements."""
    groups = []
    for shape, members in indices_by_shape(matrices).items():
        max_size = max(MAX_ELEMENTS // shape.numel(), 1)
        for start in range(0, len(members), max_size):
            groups.append(members[start : start + max_size])
    return groups


def orthogonalize_distributed(
    parameters: list[Tensor],
    matrices: list[Tensor],
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """Orthogonalize matrices, each on one rank, and return the results on all ranks that need them.

    Args:
        parameters: the parameters of the matrices, which determine shapes and sharding.
        matrices: the matrices, or this rank's rows if the parameters are DTensors. The results have the same form.
        coefficients: coefficients of the Newton-Schulz iteration.
        steps: number of iterations.
        eps: lower bound of the norm that a matrix is divided by.
    """
    if isinstance(parameters[0], DTensor):
        return orthogonalize_rows(parameters, matrices, coefficients, steps, eps)  # type: ignore[arg-type]
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return orthogonalize(matrices, coefficients, steps, eps)
    owners = owners_of(parameters, dist.get_world_size())
    own = select(matrices, indices_of(owners, dist.get_rank()))
    return all_gather_results(matrices, owners, orthogonalize(own, coefficients, steps, eps))


def owners_of(parameters: Sequence[Tensor], world_size: int) -> list[int]:
    """Return the rank that orthogonalizes each matrix. Equal shapes are assigned in turn, to balance the work."""
    order = sorted(range(len(parameters)), key=lambda i: sorted(parameters[i].shape))
    owners = [0] * len(parameters)
    for position, i in enumerate(order):
        owners[i] = position % world_size
    return owners


def indices_of(owners: Sequence[int], rank: int) -> list[int]:
    """Return the indices of the matrices that a rank owns."""
    return [i for i, owner in enumerate(owners) if owner == rank]


def all_gather_results(matrices: list[Tensor], owners: list[int], results: list[Tensor]) -> list[Tensor]:
    """Return the results of all ranks, by one collective operation.

    Args:
        matrices: tensors of the results' shapes.
        owners: rank that computed each result.
        results: this rank's own results.
    """
    world_size = dist.get_world_size()
    counts = [0] * world_size
    for matrix, owner in zip(matrices, owners):
        counts[owner] += matrix.numel()
    sent = matrices[0].new_zeros(max(counts))
    if results:
        sent[: counts[dist.get_rank()]] = torch.cat([result.flatten() for result in results])
    received = sent.new_empty(world_size * len(sent))
    # Sent as bytes, because not every backend supports bfloat16.
    dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8))
    remaining = list(received.view(world_size, -1))  # per rank, the elements that are not yet assigned
    gathered = []
    for matrix, owner in zip(matrices, owners):
        gathered.append(remaining[owner][: matrix.numel()].view(matrix.shape))
        remaining[owner] = remaining[owner][matrix.numel() :]
    return gathered


# --------------------------------------------------------------------------------------------------------- sharded rows


def orthogonalize_rows(
    parameters: list[DTensor],
    rows: list[Tensor],
    coefficients: Sequence[float],
    steps: int,
    eps: float,
) -> list[Tensor]:
    """Orthogonalize matrices whose rows are sharded (FSDP2): all rows go to the matrix's owner, and results back.

    Args:
        parameters: the parameters of the matrices.
        rows: this rank's rows of each matrix. The results have the same shapes.
        coefficients: coefficients of the Newton-Schulz iteration.
        steps: number of iterations.
        eps: lower bound of the norm that a matrix is divided by.
    """
    check_sharding(parameters)
    owners = owners_of(parameters, parameters[0].device_mesh.size())
    matrices = send_to_owners(parameters, rows, owners)
    results = orthogonalize(matrices, coefficients, steps, eps)
    return return_results(parameters, rows, owners, results)


def send_to_owners(parameters: list[DTensor], rows: list[Tensor], owners: list[int]) -> list[Tensor]:
    """Send this rank's rows of each matrix to its owner, and return the matrices that this rank owns."""
    mesh = parameters[0].device_mesh
    outgoing = lists_by_rank(mesh.size())
    for tensor, owner in zip(rows, owners):
        outgoing[owner].append(tensor)
    incoming_shapes = lists_by_rank(mesh.size())
    for i in indices_of(owners, mesh.get_local_rank()):
        for sender, height in enumerate(row_counts(parameters[i], mesh.size())):
            incoming_shapes[sender].append((height, parameters[i].shape[1]))
    received = all_to_all(outgoing, incoming_shapes, rows[0], mesh.get_group())
    return [torch.cat(parts) for parts in zip(*received)]


def return_results(
    parameters: list[DTensor],
    rows: list[Tensor],
    owners: list[int],
    results: list[Tensor],
) -> list[Tensor]:
    """Send each rank its rows of this rank's results, and return this rank's rows of all results.

    Args:
        parameters: the parameters of the matrices.
        rows: tensors of the shapes of this rank's rows.
        owners: rank that owns each matrix.
        results: the results of the matrices that this rank owns.
    """
    mesh = parameters[0].device_mesh
    outgoing = lists_by_rank(mesh.size())
    for i, result in zip(indices_of(owners, mesh.get_local_rank()), results):
        for receiver, part in enumerate(result.split(row_counts(parameters[i], mesh.size()))):
            outgoing[receiver].append(part)
    own_shapes = lists_by_rank(mesh.size())
    for tensor, owner in zip(rows, owners):
        own_shapes[owner].append(tuple(tensor.shape))
    returned = all_to_all(outgoing, own_shapes, rows[0], mesh.get_group())
    remaining = list(map(iter, returned))
    return [next(remaining[owner]) for owner in owners]


def lists_by_rank(world_size: int) -> list[list[Any]]:
    """Return an empty list for each rank."""
    return [[] for _ in range(world_size)]


def check_sharding(parameters: list[DTensor]) -> None:
    """Raise ValueError unless all parameters are sharded by rows over one mesh."""
    for p in parameters:
        if p.device_mesh != parameters[0].device_mesh or tuple(p.placements) != (Shard(0),):
            raise ValueError(f"parameters of Muon must be sharded by rows over one mesh, got {p.placements}")


def row_counts(parameter: DTensor, world_size: int) -> list[int]:
    """Return the number of a matrix's rows on each rank, as ``torch.chunk`` divides them."""
    num_rows = parameter.shape[0]
    chunk_size = math.ceil(num_rows / world_size)
    return [min(max(num_rows - rank * chunk_size, 0), chunk_size) for rank in range(world_size)]


def total_elements(shapes: Iterable[Sequence[int]]) -> int:
    """Return the number of elements of tensors of some shapes."""
    return sum(map(math.prod, shapes))


def all_to_all(
    outgoing: list[list[Tensor]],
    incoming_shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Send tensors to each rank and receive tensors from each, by one collective operation.

    Args:
        outgoing: tensors for each rank.
        incoming_shapes: shapes of the tensors from each rank.
        like: a tensor of the common dtype and device.
        group: process group of the ranks.
    """
    received_sizes = [total_elements(shapes) for shapes in incoming_shapes]
    sent_sizes = [sum(map(Tensor.numel, tensors)) for tensors in outgoing]
    flat = [tensor.flatten() for tensor in chain.from_iterable(outgoing)]
    sent = torch.cat(flat) if flat else like.new_empty(0)
    received = like.new_empty(sum(received_sizes))
    # Sent as bytes, because not every backend supports bfloat16.
    dist.all_to_all_single(
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [like.itemsize * size for size in received_sizes],
        [like.itemsize * size for size in sent_sizes],
        group=group,
    )
    incoming = lists_by_rank(len(incoming_shapes))
    start = 0
    for tensors, shapes in zip(incoming, incoming_shapes):
        for shape in shapes:
            size = math.prod(shape)
            tensors.append(received[start : start + size].view(shape))
            start += size
    return incoming
