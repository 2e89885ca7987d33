"""Optimizers that act as one, and learning-rate schedules."""

from __future__ import annotations

import copy
import itertools

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from models import VQGAN_SIZES, make_transformer, make_vqgan
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from clipgen.models.config import TransformerOptimizerConfig
from clipgen.optim import OptimizerList, has_fused_kernels, lr_lambda, make_optimizer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def train(module: nn.Module, optimizers: list, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        (module(x) - x[:, :2]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def muon_and_adamw(module: nn.Module) -> list:
    matrices = [p for p in module.parameters() if p.ndim == 2]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.01)]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_optimizer_list_equals_separate_optimizers():
    separate, joint = net(), net()
    train(separate, muon_and_adamw(separate), 5)
    train(joint, [OptimizerList(*muon_and_adamw(joint))], 5)
    assert equal(separate, joint) and not equal(joint, net())


def test_optimizer_list_loads_the_state_of_its_parts():
    uninterrupted = net()
    train(uninterrupted, [OptimizerList(*muon_and_adamw(uninterrupted))], 6)
    interrupted = net()
    first = OptimizerList(*muon_and_adamw(interrupted))
    train(interrupted, [first], 3)
    resumed = copy.deepcopy(interrupted)
    second = OptimizerList(*muon_and_adamw(resumed))
    second.load_state_dict(first.state_dict())
    train(resumed, [second], 3, first=3)
    assert equal(uninterrupted, resumed)


def test_schedule_applies_to_the_parts():
    module = net()
    joint = OptimizerList(*muon_and_adamw(module))
    schedule = torch.optim.lr_scheduler.LambdaLR(joint, lambda step: 0.0)
    before = copy.deepcopy(module)
    train(module, [joint], 2)
    assert equal(module, before) and schedule.get_last_lr() == [0.0, 0.0]


def test_muon_updates_only_the_matrices_of_the_blocks():
    transformer = make_transformer(n_layer=2, n_head=2, n_embd=32, codebook_size=16, num_tokens=16, clip_dim=64)
    blocks = transformer.gpt.transformer.h
    optimizer = make_optimizer(transformer, blocks, TransformerOptimizerConfig(name="muon", weight_decay=0.1))
    assert isinstance(optimizer, OptimizerList)
    muon, adamw = ({id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert muon == {id(p) for p in blocks.parameters() if p.ndim == 2} and len(muon) == 8
    assert adamw == {id(p) for p in transformer.parameters()} - muon


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_embeddings_are_decayed_unless_disabled(decay_embeddings):
    sizes = dict(n_layer=1, n_head=2, n_embd=32, codebook_size=16, num_tokens=16, clip_dim=64, tie_embeddings=False)
    transformer = make_transformer(**sizes)
    config = TransformerOptimizerConfig(weight_decay=0.1, decay_embeddings=decay_embeddings)
    decayed, others = make_optimizer(transformer, transformer.gpt.transformer.h, config).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    network = transformer.gpt.transformer
    in_decayed = [any(p is embedding.weight for p in decayed["params"]) for embedding in (network.wte, network.wpe)]
    assert in_decayed == [decay_embeddings] * 2
    assert any(p is transformer.gpt.head.weight for p in decayed["params"])


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name must be one of adamw, muon, got 'sgd'"):
        make_transformer(optimizer_name="sgd")


@pytest.mark.parametrize("start", [0, 300])
def test_cosine_ends_with_the_training(start):
    """An optimizer that starts later has the same rate at the same step of the training, except in its warm-up."""
    multiplier = lr_lambda("cosine", 10, 400, start)
    without_warmup = lr_lambda("cosine", 0, 390)
    assert multiplier(0) == pytest.approx(0.1 * without_warmup(max(start - 10, 0)))
    assert multiplier(4) == pytest.approx(0.5 * without_warmup(max(start - 6, 0)))
    for step in (start + 10, start + 50, 399):
        assert multiplier(step - start) == pytest.approx(without_warmup(step - 10))
    assert multiplier(400 - start) == pytest.approx(0)
    constant = lr_lambda("constant", 10, 400, start)
    assert [constant(i) for i in (0, 4, 10, 500)] == [0.1, 0.5, 1, 1]


def test_schedules_of_generator_and_discriminator_end_together(images):
    vqgan = make_vqgan(**VQGAN_SIZES | dict(gan_weight=0.5, gan_start_step=2, schedule="cosine"))
    trainer = pl.Trainer(max_steps=6, accelerator="cpu", **QUIET)
    trainer.fit(vqgan, DataLoader([{"images": image} for image in images] * 3, batch_size=4))
    assert [scheduler.get_last_lr() for scheduler in vqgan.lr_schedulers()] == [[0.0], [0.0]]


@pytest.mark.parametrize(("batches", "max_steps", "steps"), [(5, -1, 6), (6, -1, 6), (5, 9, 6), (5, 4, 4)])
def test_cosine_ends_with_the_last_epoch_under_gradient_accumulation(images, batches, max_steps, steps):
    """The last step of an epoch may have fewer batches than the others, but counts as a step."""
    vqgan = make_vqgan(**VQGAN_SIZES | dict(schedule="cosine", grad_accum_steps=3))
    trainer = pl.Trainer(max_epochs=3, max_steps=max_steps, accelerator="cpu", **QUIET)
    trainer.fit(vqgan, DataLoader([{"images": image} for image in images[:batches]], batch_size=1))
    assert trainer.global_step == steps
    multiplier = vqgan.lr_schedulers().lr_lambdas[0]
    assert multiplier(steps - 1) > 0.01 and multiplier(steps) == pytest.approx(0)


class Stream(IterableDataset):
    """An endless stream of images, as from tar shards."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __iter__(self):
        return ({"images": image} for image in itertools.cycle(self.images))


def test_cosine_needs_a_finite_number_of_steps(images):
    """Otherwise the learning rate would be zero after the warm-up."""
    vqgan = make_vqgan(**VQGAN_SIZES | dict(schedule="cosine"))
    settings = dict(max_epochs=2, accelerator="cpu", **QUIET)
    with pytest.raises(ValueError, match="schedule='cosine' needs a finite number of steps"):
        pl.Trainer(**settings, max_time={"seconds": 10}).fit(vqgan, DataLoader(Stream(images), batch_size=2))
    trainer = pl.Trainer(**settings, limit_train_batches=2)
    trainer.fit(vqgan, DataLoader(Stream(images), batch_size=2))
    assert vqgan.lr_schedulers().get_last_lr() == [0.0]


def test_optimizers_are_not_fused_if_torch_lacks_its_private_function(monkeypatch):
    module = net()
    assert has_fused_kernels(module.parameters())
    monkeypatch.delattr("torch.utils._foreach_utils._get_fused_kernels_supported_devices")
    assert not has_fused_kernels(module.parameters())
    optimizer = make_optimizer(module, module, TransformerOptimizerConfig())
    assert not optimizer.defaults["fused"]
    train(module, [optimizer], steps=1)
