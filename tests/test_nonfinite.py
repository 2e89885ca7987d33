"""Non-finite steps change nothing, too many of them stop a training, and no good checkpoint is overwritten."""

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
    """Shapes, or cached indices and embeddings, that are NaN in the given batches."""

    def __init__(self, batches: int, bad: set[int], cached: bool = False) -> None:
        self.images = ShapesDataset(batches * BATCH, seed=3)
        self.bad = bad
        self.cached = cached

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
    """Record the state of module and optimizers after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        state = weights_of(module)
        for i, optimizer in enumerate(trainer.optimizers):
            for number, moments in optimizer.state_dict()["state"].items():
                state |= {f"{i}.{number}.{name}": value.clone() for name, value in moments.items()}
        self.states.append(state)


def train(module, batches: int, bad: set[int], **settings) -> Snapshots:
    seen = Snapshots()
    data = Poisoned(batches, bad, cached=isinstance(module, ConditionalTransformer))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[seen], **QUIET | settings)
    trainer.fit(module, DataLoader(data, batch_size=BATCH))
    return seen


def gan(**arguments) -> Tokenizer:
    """Return a VQ-GAN with all state that a forward pass changes, and without EMA, which skipped steps update."""
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
    [
        gan,
        lambda: gan(codebook_ema_decay=0.0),
        lambda: make_vqgan(**VQGAN_SIZES),
        transformer,
        lambda: transformer(optimizer_name="muon", grad_clip=1.0),
    ],
    ids=["gan", "gan, codes by gradient", "vqgan", "transformer", "muon"],
)
def test_non_finite_step_changes_nothing(make):
    """Weights, codes, batch-norm statistics and optimizer states are unchanged; the next step is taken."""
    states = train(make(), 4, bad={2}).states
    assert differing(states[0], states[1]) and differing(states[2], states[3])
    assert not differing(states[1], states[2])
    assert all(torch.isfinite(value).all() for value in states[3].values())


def test_accumulated_step_is_skipped_as_a_whole():
    states = train(gan(grad_accum_steps=2), 6, bad={2}).states
    assert not differing(states[1], states[3]) and differing(states[3], states[5])
    module = transformer()
    states = train(module, 6, bad={3}, accumulate_grad_batches=2).states
    assert not differing(states[1], states[3]) and differing(states[3], states[5])


def test_optimizers_without_found_inf_get_zero_gradients():
    """Their moments decay, but stay finite."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    guard = StepGuard(max_skipped_steps=3)
    for gradient in (1.0, float("nan")):
        weight.grad = torch.full((3,), gradient)
        guard.before_step([optimizer], step=1)
        optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].tolist() == pytest.approx([0.9] * 3)
    assert weight.tolist() == pytest.approx([1 - 0.1 - 0.09] * 3)
    assert guard.read(step=2) == 1


@pytest.mark.parametrize(
    "make", [lambda: gan(grad_clip=0.0), lambda: transformer(optimizer_name="muon")], ids=["gan", "muon"]
)
def test_guard_does_not_change_finite_steps(monkeypatch, make):
    states = []
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(StepGuard, "before_step", lambda *_: None)
        torch.manual_seed(1)
        states.append(train(make(), 4, bad=set()).states[-1])
    assert not differing(*states)


@pytest.mark.parametrize("make", [gan, transformer], ids=["gan", "transformer"])
def test_too_many_consecutive_skipped_steps_stop_the_training(make):
    """Even if the last step before the check was finite. The error names the first step and the term."""
    term = "cross_entropy" if make is transformer else "reconstruction_loss"
    message = rf"stopped at step 10: 3 consecutive steps were skipped, .*non-finite .*{term}.* from step 5 on; a lower"
    module = make(max_skipped_steps=3)
    with pytest.raises(NonFiniteError, match=message):
        train(module, 12, bad={4, 5, 6})
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_few_skipped_steps_are_logged_and_training_continues(caplog):
    train(transformer(max_skipped_steps=3), 12, bad={2, 3, 5, 6, 8})
    assert "up to 2 consecutive steps were skipped, with a non-finite cross_entropy from step 3 on" in caplog.text


def test_training_that_ends_in_skipped_steps_fails():
    with pytest.raises(NonFiniteError, match="ended with 1 skipped steps at step 3, with a non-finite cross_entropy"):
        train(transformer(), 3, bad={2})


def test_non_finite_validation_loss_stops_the_training():
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
def test_resume_that_overflows_overwrites_no_good_checkpoint(call, arguments, rate):
    """The learning rate is so large that the first step ruins the weights."""
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
    """Return the contents of all files with weights, by path."""
    paths = [*run.rglob("*.ckpt"), *run.rglob("*.safetensors")]
    return {str(path): path.read_bytes() for path in paths}


def test_invalid_max_skipped_steps_is_refused():
    with pytest.raises(ValueError, match="max_skipped_steps must be at least 1, got 0"):
        gan(max_skipped_steps=0)


# ------------------------------------------------------------------------------------------------- several processes


class SameAfterSkip(pl.Callback):
    """Put NaN into the second batch of one of two ranks, and check that both skip the step."""

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
def test_all_ranks_skip_a_step_that_is_non_finite_on_one(make):
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


def test_copied_module_has_its_own_guard():
    module = transformer()
    assert copy.deepcopy(module).guard is not module.guard
