"""Muon, compared with torch.optim.Muon, and two processes compared with one."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.optim._muon as reference
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from clipgen import muon
from clipgen.hardware import device
from clipgen.muon import Muon

# Shapes as in two blocks of GPT-2: wide, square, wide, tall.
SHAPES = [(16, 48), (16, 16), (16, 64), (64, 16)] * 2
OPTIONS: dict[str, Any] = dict(lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Take one step per seed, with random gradients of that seed."""
    for seed in seeds:
        for parameter, gradient in zip(parameters, matrices(seed)):
            parameter.grad = gradient
        optimizer.step()


def parameters_of(tensors: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


@pytest.fixture
def fp32_reference(monkeypatch):
    """Make torch.optim.Muon iterate in float32."""
    source = inspect.getsource(reference._zeropower_via_newtonschulz)
    assert "grad.bfloat16()" in source
    names: dict[str, Any] = {"torch": torch, "Tensor": Tensor}
    exec(source.replace("grad.bfloat16()", "grad.float().clone()"), names)
    monkeypatch.setattr(reference, "_zeropower_via_newtonschulz", names["_zeropower_via_newtonschulz"])


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_updates_equal_torch_in_float32(fp32_reference, nesterov, adjust_lr_fn):
    options = OPTIONS | dict(nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    theirs, ours = parameters_of(matrices(0)), parameters_of(matrices(0))
    step(theirs, torch.optim.Muon(theirs, **options), range(1, 5))
    step(ours, Muon(ours, **options, dtype=torch.float32), range(1, 5))
    for a, b, before in zip(ours, theirs, matrices(0)):
        torch.testing.assert_close(a, b, atol=1e-5 * (a - before).abs().max().item(), rtol=1e-6)
        assert (a - before).norm() > 0.01 * before.norm()


def test_updates_equal_torch_in_bfloat16():
    """Equal up to the rounding of a bfloat16 iteration."""
    theirs, ours = parameters_of(matrices(0)), parameters_of(matrices(0))
    step(theirs, torch.optim.Muon(theirs, **OPTIONS), range(1, 3))
    step(ours, Muon(ours, **OPTIONS, dtype=torch.bfloat16), range(1, 3))
    for a, b, before in zip(ours, theirs, matrices(0)):
        assert (a - b).norm() < 0.02 * (b - before).norm()


def test_torch_checkpoints_can_be_resumed(fp32_reference):
    uninterrupted, theirs = parameters_of(matrices(0)), parameters_of(matrices(0))
    step(uninterrupted, torch.optim.Muon(uninterrupted, **OPTIONS), range(1, 7))
    first = torch.optim.Muon(theirs, **OPTIONS)
    step(theirs, first, range(1, 4))
    ours = parameters_of([p.data for p in theirs])
    second = Muon(ours, lr=9.0, dtype=torch.float32)
    second.load_state_dict(first.state_dict())
    step(ours, second, range(4, 7))
    torch.testing.assert_close(ours, uninterrupted, atol=1e-5, rtol=1e-5)
    assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
    assert second.state_dict()["state"].keys() == first.state_dict()["state"].keys()


def test_matrices_of_equal_shape_are_iterated_together(monkeypatch):
    shapes = []
    iterate = muon.newton_schulz

    def record(x, *options):
        shapes.append(tuple(x.shape))
        return iterate(x, *options)

    monkeypatch.setattr(muon, "newton_schulz", record)
    muon.iteration.cache_clear()
    parameters = parameters_of(matrices(0))
    step(parameters, Muon(parameters, **OPTIONS), range(1, 2))
    muon.iteration.cache_clear()
    assert shapes == [(2, 16, 48), (2, 16, 16), (4, 16, 64)]


def step_on_a_cpu() -> list[nn.Parameter]:
    """Return matrices after three steps."""
    parameters = parameters_of(matrices(0))
    step(parameters, Muon(parameters, **OPTIONS), range(1, 4))
    return parameters


def step_as_on_a_gpu(monkeypatch, compile: Callable[..., Any], can_compile: bool = True) -> list[nn.Parameter]:
    """Return the same matrices after steps as on a GPU, with another torch.compile."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        patch.setattr(device, "can_compile", lambda: can_compile)
        iterate = muon.iteration.__wrapped__("cuda")
        patch.setattr(muon, "iteration", lambda device_type: iterate)
        return step_on_a_cpu()


def test_compiled_iteration_gives_the_same_update(monkeypatch, caplog):
    """As on a GPU, but with the backend that runs the traced operations themselves."""
    caplog.set_level(logging.WARNING)
    compile = partial(torch.compile, backend="eager", fullgraph=True)
    torch.testing.assert_close(step_as_on_a_gpu(monkeypatch, compile), step_on_a_cpu())
    assert not caplog.messages


def raise_error(*_: Any, **__: Any) -> Any:
    raise RuntimeError("Failed to find\nC compiler")


@pytest.mark.parametrize("compile", [raise_error, lambda *_, **__: raise_error], ids=["at once", "when called"])
def test_matrices_are_iterated_uncompiled_once_torch_compile_failed(monkeypatch, caplog, compile):
    assert all(map(torch.equal, step_as_on_a_gpu(monkeypatch, compile), step_on_a_cpu()))
    (warning,) = caplog.messages
    assert warning == "Muon iterates uncompiled, because torch.compile failed: Failed to find C compiler"


def test_matrices_are_iterated_uncompiled_without_triton(monkeypatch):
    step_as_on_a_gpu(monkeypatch, lambda *_, **__: pytest.fail("compiled"), can_compile=False)


def spectra() -> list[Tensor]:
    """Return wide matrices with singular values of about one size, of few sizes, and over five decades."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 48, 160, generator=generator)
    low_rank = plain[:, :, :4] @ plain[:, :4] + 1e-3 * plain
    return [plain, low_rank, plain * torch.logspace(0, -5, 48)[:, None]]


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 1.0)])
def test_iterating_gram_matrices_is_about_as_exact_as_the_plain_iteration(monkeypatch, steps, dtype, limit):
    """Compared with float64."""
    for x in spectra():
        x = x.to(dtype)
        expected = muon.newton_schulz(x.double(), muon.COEFFICIENTS, steps, 1e-7)
        errors = []
        for ratio in (2, 1000):
            monkeypatch.setattr(muon, "MIN_GRAM_RATIO", ratio)
            result = muon.newton_schulz(x, muon.COEFFICIENTS, steps, 1e-7)
            errors.append(((result - expected).norm() / expected.norm()).item())
        assert errors[0] < min(4 * errors[1], limit)


@pytest.mark.parametrize(("columns", "fraction"), [(96, 0.88), (144, 0.75), (192, 0.67)])
def test_iterating_gram_matrices_takes_fewer_operations(monkeypatch, columns, fraction):
    x = torch.randn(1, 48, columns)
    counts = []
    for ratio in (2, 1000):
        monkeypatch.setattr(muon, "MIN_GRAM_RATIO", ratio)
        with FlopCounterMode(display=False) as counter:
            muon.newton_schulz(x, muon.COEFFICIENTS, 5, 1e-7)
        counts.append(counter.get_total_flops())
    assert counts[0] / counts[1] == pytest.approx(fraction, abs=0.01)


def test_large_stacks_are_split(monkeypatch):
    expected = muon.orthogonalize(matrices(1), muon.COEFFICIENTS, 5, 1e-7)
    monkeypatch.setattr(muon, "MAX_ELEMENTS", 1)
    parts = muon.orthogonalize(matrices(1), muon.COEFFICIENTS, 5, 1e-7)
    torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)
    assert muon.group_by_shape(matrices(1)) == [[0], [4], [1], [5], [2], [6], [3], [7]]


def test_singular_values_become_about_one():
    not_square = [matrix for matrix in matrices(1) if matrix.shape != (16, 16)]  # square matrices have some near 0
    for result in muon.orthogonalize(not_square, muon.COEFFICIENTS, 5, 1e-7):
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5 and values.max() < 1.3


def test_parameters_without_gradient_are_unchanged():
    used, unused = parameters_of([torch.ones(2, 3), torch.ones(2, 3)])
    used.grad = torch.randn(2, 3)
    optimizer = Muon([used, unused])
    optimizer.step()
    assert torch.equal(unused.data, torch.ones(2, 3)) and unused not in optimizer.state
    assert not torch.equal(used.data, torch.ones(2, 3))


@pytest.mark.parametrize("nesterov", [True, False])
def test_step_with_found_inf_changes_nothing(nesterov):
    parameters = parameters_of(matrices(0))
    optimizer = Muon(parameters, **OPTIONS, nesterov=nesterov, dtype=torch.float32)
    step(parameters, optimizer, range(1, 3))
    weights = [p.detach().clone() for p in parameters]
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]

    optimizer.found_inf = torch.ones(())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    for parameter, weight, buffer in zip(parameters, weights, momentum):
        assert torch.equal(parameter, weight)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)


def test_step_without_found_inf_is_bit_identical():
    ours, expected = parameters_of(matrices(0)), parameters_of(matrices(0))
    step(expected, Muon(expected, **OPTIONS, dtype=torch.float32), range(1, 4))
    optimizer = Muon(ours, **OPTIONS, dtype=torch.float32)
    optimizer.found_inf = torch.zeros(())
    step(ours, optimizer, range(1, 4))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match=r"parameters of Muon must be matrices, got shape \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="adjust_lr_fn must be one of original, match_rms_adamw, got 'other'"):
        Muon([nn.Parameter(torch.ones(3, 3))], adjust_lr_fn="other")


# ---------------------------------------------------------------------------------------------------- several processes


def network() -> nn.Module:
    """Return a network whose matrices, and their rows, cannot be divided evenly between two processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5))


def train(module: nn.Module, rank: int, world_size: int) -> dict[str, int]:
    """Take four steps, each rank on its part of the batch; return the collective operations of the last one."""
    optimizer = Muon([p for p in module.parameters() if p.ndim == 2], **OPTIONS, dtype=torch.float32)
    communication = CommDebugMode()
    for seed in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).chunk(world_size)[rank]
        optimizer.zero_grad()
        module(x).square().mean().backward()
        with communication:
            optimizer.step()
    check_skipped_step(module, optimizer)
    return Counter({str(name): count for name, count in communication.get_comm_counts().items() if count})


def check_skipped_step(module: nn.Module, optimizer: Muon) -> None:
    """Check that a step with ``found_inf`` and NaN gradients changes no weights of this rank."""
    before = [muon.local_rows(p).detach().clone() for p in module.parameters()]
    optimizer.found_inf = torch.ones(())
    for parameter in module.parameters():
        muon.local_rows(parameter.grad).fill_(torch.nan)
    optimizer.step()
    for parameter, weight in zip(module.parameters(), before):
        assert torch.equal(muon.local_rows(parameter), weight)


def on_two_processes(rank: int, folder: str, strategy: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = network()
    if strategy == "ddp":
        counts = train(DistributedDataParallel(module), rank, 2)
        state = module.state_dict()
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        counts = train(fully_shard(module, mesh=mesh), rank, 2)
        state = {name: tensor.full_tensor() for name, tensor in module.state_dict().items()}
    torch.save((state, counts), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("strategy", "collectives"), [("ddp", 1), ("fsdp", 2)])
def test_two_processes_match_one(tmp_path, strategy, collectives):
    """Results are exchanged in one collective operation; under FSDP2 rows are sent in another one before."""
    mp.spawn(on_two_processes, (str(tmp_path), strategy), nprocs=2)
    (first, counts), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    module = network()
    train(module, 0, 1)
    assert sum(counts.values()) == collectives, counts
    for name, tensor in module.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4)
