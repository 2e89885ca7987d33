"""Samplers: training resumes at the same item, and validation counts every item once, on any number of processes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from torch.utils.data import DataLoader, DistributedSampler

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.samplers import DataPositionCallback, ResumableSampler, ValidationSampler, num_real_samples


def taken(size: int, count: int, consumed: int = 0, **options) -> list:
    order = ResumableSampler(list(range(size)), seed=3, **options)
    order.consumed = consumed
    items: list = []
    while len(items) < count:
        items += list(order)
    return items[:count]


@pytest.mark.parametrize("start", range(9))
def test_sampler_resumes_at_any_item(start):
    full = taken(14, 60, batch_size=4)
    assert taken(14, 20, 4 * start, batch_size=4) == full[4 * start : 4 * start + 20]


def test_each_epoch_has_every_item_once_in_another_order():
    items = taken(12, 24, batch_size=4)
    assert sorted(items[:12]) == sorted(items[12:]) == list(range(12)) and items[:12] != items[12:]


def test_sampler_needs_no_list_of_all_items():
    order = ResumableSampler(range(300_000), 100, seed=0)
    tracemalloc.start()
    try:
        assert len({item for item, _ in zip(order, range(30_000))}) == 30_000
        tracemalloc.reset_peak()
        items = iter(order)
        next(items)
        assert tracemalloc.get_traced_memory()[1] < 2e6  # of 300 000 numbers: 12e6
    finally:
        tracemalloc.stop()


def test_ranks_share_an_epoch():
    first, second = (taken(16, 8, batch_size=4, rank=rank, world_size=2) for rank in range(2))
    assert sorted(first + second) == list(range(16))


class Seen(pl.LightningModule):
    """A module that records the first item of each batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.items = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.items.append(int(batch["images"][0]))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_limited_epoch_starts_where_the_last_ended(tmp_path):
    """Workers fetch more items than ``limit_train_batches`` allows; the next epoch starts with those."""
    items = [{"images": torch.tensor(number)} for number in range(60)]

    def run(workers: int, epochs: int, ckpt: Path | None = None) -> list[int]:
        settings = dict(max_epochs=epochs, limit_train_batches=5, default_root_dir=tmp_path)
        trainer = pl.Trainer(accelerator="cpu", **settings, **QUIET)
        trainer.fit(module := Seen(), ImageDataModule(items, None, 1, workers), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.items

    straight = run(0, 3)
    assert len(set(straight)) == 15 and run(2, 3) == straight
    assert run(2, 2) + run(2, 3, tmp_path / "last.ckpt") == straight


class Rank(pl.Trainer):
    """A trainer that claims to be one of several processes, without communication."""

    rank, size = 0, 1
    global_rank = property(lambda self: self.rank)  # type: ignore[assignment]
    world_size = property(lambda self: self.size)  # type: ignore[assignment]


class AllSeen(Seen):
    """A module that records all items of each batch."""

    def training_step(self, batch, batch_idx):
        self.items.append(batch["images"].tolist())
        return self.weight.sum()


def joined(batches: list[list[int]]) -> list[int]:
    return [item for batch in batches for item in batch]


def trained_items(folder: Path, steps: int, batch_size: int, rank: int, size: int, ckpt: bool) -> list[list[int]]:
    """Train one rank on 60 items and return the items of each of its batches."""
    items = [{"images": torch.tensor(number)} for number in range(60)]
    trainer = Rank(
        max_steps=steps, accelerator="cpu", callbacks=[DataPositionCallback()], default_root_dir=folder, **QUIET
    )
    trainer.rank, trainer.size = rank, size
    module = AllSeen()
    path = folder / "last.ckpt"
    trainer.fit(module, ImageDataModule(items, None, batch_size), ckpt_path=path if ckpt else None)
    if rank == size - 1:  # after the others have read it
        trainer.save_checkpoint(path)
    return module.items


def test_resume_with_other_devices_and_batch_size_shows_each_item_once(tmp_path):
    """Each epoch shows every item once over all ranks, and ends where Lightning's epoch ends."""
    before = [trained_items(tmp_path, 6, 4, rank, 2, False) for rank in range(2)]  # 48 of 60
    after = trained_items(tmp_path, 6 + 4 + 20, 3, 0, 1, True)
    assert sorted(joined(before[0] + before[1] + after[:4])) == list(range(60))
    assert sorted(joined(after[4:])) == list(range(60))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    epoch = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert epoch["is_last_batch"] and epoch["current"]["processed"] == 20
    full = [trained_items(tmp_path / "whole", 5, 6, rank, 2, False) for rank in range(2)]
    assert sorted(joined(full[0] + full[1])) == list(range(60))


def test_data_position_survives_several_batch_sizes(tmp_path):
    shown = trained_items(tmp_path, 2, 5, 0, 1, False)
    for steps, batch_size in ((4, 10), (5, 15), (9, 5), (20, 3)):
        shown += trained_items(tmp_path, steps, batch_size, 0, 1, True)
    items = joined(shown)
    straight = joined(trained_items(tmp_path / "straight", len(items) // 5, 5, 0, 1, False))
    assert items[: len(straight)] == straight


def test_checkpoint_without_a_data_position_resumes_by_batches(tmp_path):
    trained_items(tmp_path, 3, 5, 0, 1, False)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint.pop("data_position") == {"epoch": 0, "items": 15, "batches": 3}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    straight = trained_items(tmp_path / "straight", 6, 5, 0, 1, False)
    assert trained_items(tmp_path, 6, 5, 0, 1, True) == straight[3:]


def test_batch_size_larger_than_the_dataset_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch_size must be at most 3, the training images per device, got 4"):
        ResumableSampler(range(7), 4, seed=0, world_size=2)


# --------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_batches_of_a_single_process(size, world_size):
    """Each rank gets the same number of batches, and each item is counted once."""
    batches: dict[int, list[int]] = {}
    lengths = set()
    for rank in range(world_size):
        sampler = ValidationSampler(range(size), 4, rank, world_size)
        rank_batches = list(DataLoader(range(size), 4, sampler=sampler, collate_fn=list))
        assert len(rank_batches) == sampler.batches and sum(map(len, rank_batches)) == len(sampler)
        lengths.add(len(rank_batches))
        for number, batch in enumerate(rank_batches):
            real_items = batch[: sampler.num_real_samples(number)]
            if real_items:
                batches[number * world_size + rank] = real_items
    assert [batches[number] for number in sorted(batches)] == list(DataLoader(range(size), 4, collate_fn=list))
    assert len(lengths) == 1


def test_repetitions_of_torchs_distributed_sampler_are_not_counted():
    counted = []
    for rank in range(2):
        loader = DataLoader(range(5), 2, sampler=DistributedSampler(range(5), 2, rank, shuffle=False), collate_fn=list)
        trainer = type("Trainer", (), {"val_dataloaders": loader})
        for number, batch in enumerate(loader):
            counted += batch[: num_real_samples(trainer, number, len(batch))]
    assert sorted(counted) == list(range(5))
