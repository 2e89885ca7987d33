"""Non-finite steps change nothing, too many of them stop a training, and nothing good is replaced by what is not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from commands import SHAPES, TRANSFORMER, VQGAN
from conftest import QUIET, changed, weights_of
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from torch.utils.data import DataLoader, Dataset

from clipgen.data.shapes import ShapesDataset
from clipgen.nonfinite import NonFiniteError, StepGuard, check_weights
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN as Tokenizer

BATCH = 4


class Poisoned(Dataset):
    """Shapes, or cached indices with embeddings, that are NaN in the batches of the given numbers."""

    def __init__(self, batches: int, bad: set[int], cached: bool = False) -> None:
        self.images, self.bad, self.cached = ShapesDataset(batches * BATCH, seed=3), bad, cached

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        factor = float("nan") if item // BATCH in self.bad else 1.0
        if self.cached:
            embedding = torch.nn.functional.normalize(
                torch.randn(64, generator=torch.Generator().manual_seed(item)), dim=0
            )
            return {"indices": torch.arange(16).roll(item), "condition": embedding * factor}
        return {"images": self.images[item]["images"] * factor}


class Snapshots(pl.Callback):
    """The whole state, optimizers included, after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        state = weights_of(module)
        for half, optimizer in enumerate(trainer.optimizers):
            for number, moments in optimizer.state_dict()["state"].items():
                state |= {f"{half}.{number}.{name}": value.clone() for name, value in moments.items()}
        self.states.append(state)


def train(module, batches: int, bad: set[int], **settings) -> Snapshots:
    seen = Snapshots()
    data = Poisoned(batches, bad, cached=isinstance(module, ConditionalTransformer))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[seen], **QUIET | settings)
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    return seen


def gan(**arguments) -> Tokenizer:
    """With everything that a forward pass moves, and without an average, which moves towards the same weights again."""
    more = dict(
        gan_weight=0.8,
        gan_start_step=0,
        lecam_weight=0.1,
        codebook_ema_decay=0.9,
        dead_code_reset_after=2,
        grad_clip=1.0,
    )
    return make_vqgan(**VQGAN_SIZES | more | arguments)


def transformer(**arguments) -> ConditionalTransformer:
    return make_transformer(**TRANSFORMER_SIZES | dict(cond_drop_prob=0.0) | arguments)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize(
    "make",
    [gan, lambda: gan(codebook_ema_decay=0.0), lambda: make_vqgan(**VQGAN_SIZES), transformer],
    ids=["gan", "gan, codes by gradient", "vqgan", "transformer"],
)
def test_a_non_finite_step_changes_nothing(make):
    """Not the weights, the codes, the statistics of batch norm or the moments of Adam; the next step counts again."""
    states = train(make(), 4, bad={2}).states
    assert differing(states[0], states[1]) and differing(states[2], states[3])
    assert not differing(states[1], states[2])
    assert all(torch.isfinite(value).all() for value in states[3].values())


def test_a_step_of_several_batches_is_skipped_whole():
    states = train(gan(grad_accum_steps=2), 6, bad={2}).states
    assert not differing(states[1], states[3]) and differing(states[3], states[5])
    module = transformer()
    states = train(module, 6, bad={3}, accumulate_grad_batches=2).states
    assert not differing(states[1], states[3]) and differing(states[3], states[5])


def test_muon_stays_finite():
    """It gets zero gradients instead: its momentum decays. AdamW's part changes nothing."""
    module = transformer(optimizer_name="muon")
    before, _, after, _ = train(module, 4, bad={1, 2}, gradient_clip_val=1.0).states
    moved = {name for name in differing(before, after) if name.startswith("gpt.")}
    assert moved and all(".h." in name and name.endswith(".weight") for name in moved)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_sound_steps_are_as_without_the_guard(monkeypatch):
    states = []
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(StepGuard, "before_step", lambda *_: None)
        torch.manual_seed(1)
        states.append(train(gan(grad_clip=0.0), 4, bad=set()).states[-1])
    assert not differing(*states)


@pytest.mark.parametrize("make", [gan, transformer], ids=["gan", "transformer"])
def test_too_many_skipped_steps_in_a_row_stop_the_training(make):
    """Even if the last one before the reading was sound. The first step and the term are named."""
    term = "cross_entropy" if make is transformer else "reconstruction_loss"
    message = rf"stopped at step 10: 3 consecutive steps were skipped, .*non-finite .*{term}.* from step 5 on; a lower"
    module = make(max_skipped_steps=3)
    with pytest.raises(NonFiniteError, match=message):
        train(module, 12, bad={4, 5, 6})
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_skipped_steps_that_are_few_or_apart_are_told_and_survived(caplog):
    train(transformer(max_skipped_steps=3), 12, bad={2, 3, 5, 6, 8})
    assert "up to 2 consecutive steps were skipped, with a non-finite cross_entropy from step 3 on" in caplog.text


def test_a_training_does_not_end_in_skipped_steps():
    with pytest.raises(NonFiniteError, match="ended with 1 skipped steps at step 3, with a non-finite cross_entropy"):
        train(transformer(), 3, bad={2})


def test_a_validation_that_is_not_finite_stops_the_training():
    module = make_vqgan(**VQGAN_SIZES)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **QUIET)
    loaders = [DataLoader(Poisoned(1, bad), batch_size=BATCH) for bad in (set(), {0})]
    with pytest.raises(NonFiniteError, match="validation at step 0 has a non-finite val/reconstruction_loss"):
        trainer.fit(module, *loaders)


def test_non_finite_weights_are_never_saved(tmp_path):
    for module in (make_vqgan(**VQGAN_SIZES), transformer()):
        module.save(tmp_path / "model")
        before = (tmp_path / "model" / "model.safetensors").read_bytes()
        list(module.parameters())[3].data.view(-1)[0] = float("inf")
        with pytest.raises(NonFiniteError, match=r"must be finite, got 1 of \d+ that are not: "):
            module.save(tmp_path / "model")
        with pytest.raises(NonFiniteError, match="at step 7"):
            check_weights(module, 7)
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
        (tmp_path / "model" / "config.json").unlink()
        (tmp_path / "model" / "model.safetensors").unlink()
        (tmp_path / "model").rmdir()


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ([*VQGAN, *SHAPES], 1e30),
        ([*VQGAN, *SHAPES], 1e12),
        (
            [
                *VQGAN,
                *SHAPES,
                "quantizer=paper",
                "model.quantizer.codebook_dim=8",
                "model.gan.weight=0.5",
                "model.gan.start_step=1",
                "model.gan.channels=8",
                "model.gan.num_layers=1",
            ],
            1e30,
        ),
        ([*TRANSFORMER, *SHAPES, "vqgan=tokenizer", "model.optimizer.name=adamw"], 1e30),
        ([*TRANSFORMER, *SHAPES, "vqgan=tokenizer", "model.optimizer.name=muon"], 1e30),
    ],
    ids=["vqgan", "finite nonsense", "gan", "transformer", "muon"],
)
def test_nothing_good_is_replaced_by_a_resume_that_overflows(call, arguments, rate):
    """The rate lets the first step ruin the weights."""
    make_vqgan(**VQGAN_SIZES).save("tokenizer")
    good = call("clipgen-train", *arguments, "output=run")
    assert good.code == 0, good.stderr
    before = contents(Path("run"))
    more = ["trainer.max_steps=30", "trainer.val_check_interval=6", "checkpoint.every_n_steps=3"]
    bad = call(
        "clipgen-train",
        "resume=run",
        f"model.optimizer.learning_rate={rate}",
        "model.optimizer.schedule=constant",
        *more,
    )
    assert bad.code == 1 and "usually helps" in bad.stderr and " at step " in bad.stderr
    assert contents(Path("run")) == before


def contents(run: Path) -> dict[str, bytes]:
    """The files that hold weights."""
    return {str(path): path.read_bytes() for kind in ("*.ckpt", "*.safetensors") for path in run.rglob(kind)}


def test_refused():
    with pytest.raises(ValueError, match="max_skipped_steps must be at least 1, got 0"):
        gan(max_skipped_steps=0)


# ------------------------------------------------------------------------------------------------- several processes


class SameAfterSkip(pl.Callback):
    """Of two ranks one met NaN in the second step: both skip it."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 1 and trainer.global_rank == 1:
            for tensor in batch.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.before = weights_of(module)
        assert bool(changed(module, self.before)) == (batch_idx == 2)

    def on_train_end(self, trainer, module) -> None:
        assert trainer.global_step == 3
        for name, tensor in module.state_dict().items():
            if "running" not in name:
                first, second = module.all_gather(tensor.float())
                assert torch.equal(first, second) and torch.isfinite(first).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("make", [gan, transformer], ids=["gan", "transformer"])
def test_all_ranks_skip_a_step_that_one_of_them_cannot_take(make):
    module = make()
    data = Poisoned(6, set(), cached=make is transformer)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn_find_unused_parameters_true",
        callbacks=[SameAfterSkip()],
        **QUIET,
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH))


def test_a_copy_has_a_guard_of_its_own():
    module = transformer()
    assert copy.deepcopy(module).guard is not module.guard
