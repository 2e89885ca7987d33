"""How stage 2 trains: averaged weights, less memory, larger batches, other sizes and beginnings, several processes."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import command
from conftest import QUIET, changed, needs_bf16, weights_of
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig

from clipgen import TextToImage
from clipgen.data.shapes import ShapesDataset
from clipgen.transformer import ConditionalTransformer


def model(**arguments) -> ConditionalTransformer:
    return make_transformer(**(TRANSFORMER_SIZES | dict(cond_drop_prob=0.0) | arguments))


def embeddings(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, 64), dim=-1)


def cached(rows: int) -> list[dict[str, Tensor]]:
    """Items as the encoded cache has them."""
    e, indices = embeddings(rows), torch.randint(16, (rows, 16))
    return [{"indices": i, "condition": c} for i, c in zip(indices, e)]


# -------------------------------------------------------------------------------------------------------------- average


class Weights(pl.Callback):
    """Those after each batch."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.seen.append(weights_of(module.gpt))


@torch.no_grad()
def test_the_average_is_what_evaluation_and_files_use(tmp_path):
    """ema = decay * ema + (1 - decay) * weights, from the second step on; the first is a copy."""
    transformer, weights = model(ema_decay=0.7, learning_rate=1e-2), Weights()
    data = DataLoader(cached(12), batch_size=4)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[weights], **QUIET)
    with torch.enable_grad():
        trainer.fit(transformer, data)
    first, second, third = weights.seen
    for name, average in transformer.eval_model.state_dict().items():
        expected = 0.7 * (0.7 * first[name] + 0.3 * second[name]) + 0.3 * third[name]
        torch.testing.assert_close(average, expected)
    assert transformer.eval_model is not transformer.gpt
    assert transformer.eval_model.head.weight is transformer.eval_model.transformer.wte.weight  # tied there too

    e, indices = embeddings(3), torch.randint(16, (3, 16))
    averaged, drawn = transformer.eval_model(indices, e), transformer.eval().sample(e, seed=0)
    assert torch.equal(transformer(indices, e), averaged) and not torch.equal(transformer.gpt(indices, e), averaged)
    assert torch.equal(transformer.train()(indices, e), transformer.gpt(indices, e))
    plain = model()
    plain.gpt.load_state_dict(transformer.eval_model.state_dict())
    assert torch.equal(plain.sample(e, seed=0), drawn)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for path in (transformer.save(tmp_path / "folder"), tmp_path / "last.ckpt"):
        again = ConditionalTransformer.load(path)
        assert torch.equal(again(indices, e), averaged) and torch.equal(again.sample(e, seed=0), drawn)
    folder = ConditionalTransformer.load(tmp_path / "folder")
    assert folder.ema is None and set(folder.state_dict()) == set(plain.state_dict())  # one network, not two
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["arguments"]["ema_decay"] == 0.7

    trainer.validate(transformer, data, verbose=False)
    batch = next(iter(DataLoader(data.dataset, batch_size=12)))
    logits = transformer.eval_model(batch["indices"], batch["condition"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["indices"].flatten())
    assert trainer.callback_metrics["val/cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_average_is_not_trained():
    transformer = model(ema_decay=0.9, optimizer_name="muon")
    pl.Trainer(max_steps=1, accelerator="cpu", **QUIET).fit(transformer, DataLoader(cached(4), batch_size=4))
    trained = {id(p) for group in transformer.optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in transformer.gpt.parameters()}


def test_a_picture_says_which_weights_drew_it(tmp_path, tiny_vqgan, shapes_clip):
    """The folder that a run leaves draws the same pictures as its checkpoint: they have one fingerprint."""
    transformer = model(ema_decay=0.9)
    torch.nn.init.normal_(transformer.gpt.clip_proj.weight)  # no longer the averaged one's
    folder = ConditionalTransformer.load(transformer.save(tmp_path / "transformer"))
    prints = [TextToImage(tiny_vqgan, t, shapes_clip).fingerprint for t in (transformer, folder)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_senseless_decay_is_refused(value):
    with pytest.raises(ValueError, match=rf"ema_decay must be in \[0, 1\), got {value}"):
        model(ema_decay=value)


# ----------------------------------------------------------------------------------------------------- memory and speed


class Gradients(pl.Callback):
    """Those of the first step."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.seen = self.seen or {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


def gradients(batch: int = 8, grad_accum_steps: int = 1, **options) -> dict[str, Tensor]:
    """What the first step of a training does it with, from the same weights and items."""
    torch.manual_seed(5)
    transformer, found = model(**options), Gradients()
    data = DataLoader(cached(8), batch_size=batch)
    settings = dict(
        max_steps=1, accelerator="cpu", callbacks=[found], accumulate_grad_batches=grad_accum_steps, **QUIET
    )
    pl.Trainer(**settings).fit(transformer, data)
    return found.seen


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected) and found  # compiled modules keep their names
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_computes_blocks_twice_and_changes_no_gradient(dropout):
    calls = []
    for option in (False, True):
        torch.manual_seed(5)
        transformer = model(grad_checkpointing=option, dropout=dropout)
        count = [0]
        for block in transformer.gpt.transformer.h:
            block.mlp.act.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        pl.Trainer(max_steps=1, accelerator="cpu", **QUIET).fit(transformer, DataLoader(cached(4), batch_size=4))
        calls.append(count[0])
    assert calls == [2, 4]
    same(gradients(grad_checkpointing=True, dropout=dropout), gradients(dropout=dropout))


@pytest.mark.slow
def test_a_compiled_training_is_the_training(tmp_path):
    same(gradients(compile=True), gradients())
    found = []
    for option in (False, True):
        torch.manual_seed(5)
        transformer = model(compile=option, ema_decay=0.5, learning_rate=1e-3)
        trainer = pl.Trainer(max_steps=4, accelerator="cpu", **QUIET)
        data = DataLoader(cached(16), batch_size=4)
        trainer.fit(transformer, data, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        found.append(trainer.callback_metrics["val/cross_entropy"].item())
        ConditionalTransformer.load(tmp_path / "last.ckpt")  # an ordinary file
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_accumulated_batches_are_one_larger_batch():
    same(gradients(batch=4, grad_accum_steps=2), gradients(batch=8))


def test_the_schedule_counts_optimizer_steps():
    """Twelve batches, two a step: the cosine ends after six, the warm-up after two."""

    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    rates, transformer = Rates(), model(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, callbacks=[rates], **QUIET)
    trainer.fit(transformer, DataLoader(cached(24), batch_size=2))
    cosine = [0.5 * (1 + torch.tensor(torch.pi * step / 4).cos().item()) for step in range(4)]
    assert trainer.global_step == 6 and rates.seen == pytest.approx([0.5, 1.0, *cosine], abs=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipped_gradients(precision):
    """As long as asked for, in the old direction."""
    transformer, found = model(), Gradients()

    class After(pl.Callback):  # those hooks see them before clipping
        def on_train_start(self, trainer, module) -> None:
            trainer.optimizers[0].register_step_post_hook(
                lambda *_: clipped.update(
                    {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
                )
            )

    clipped: dict[str, Tensor] = {}
    options = dict(max_steps=1, accelerator="cpu", precision=precision, gradient_clip_val=0.01) | QUIET
    trainer = pl.Trainer(callbacks=[found, After()], **options)
    trainer.fit(transformer, DataLoader(cached(4), batch_size=4))
    norm = torch.cat([g.flatten() for g in found.seen.values()]).norm()
    assert norm > 0.1
    same(clipped, {name: gradient * 0.01 / norm for name, gradient in found.seen.items()})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16(tiny_vqgan, shapes_clip, optimizer):
    """Weights, averages and the logged loss stay in fp32; the loss falls as it does there."""
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(5)
        transformer = model(
            clip_loss_weight=0.2, clip_loss_estimator="gumbel", ema_decay=0.5, optimizer=optimizer, learning_rate=1e-2
        ).attach_encoders(tiny_vqgan, shapes_clip)
        trainer = pl.Trainer(max_steps=6, accelerator="cpu", precision=precision, **QUIET)
        data = DataLoader(ShapesDataset(48, seed=3), batch_size=8)
        trainer.fit(transformer, data, DataLoader(ShapesDataset(16, seed=4), batch_size=8))
        found[precision] = trainer.callback_metrics["val/cross_entropy"].item()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in transformer.parameters())
    assert found["bf16-mixed"] == pytest.approx(found["32-true"], rel=0.05)


def test_what_was_loaded_trains_with_dropout(tmp_path):
    """Loading leaves a model in evaluation mode, and Lightning trains it as it is."""
    transformer = ConditionalTransformer.load(model(dropout=0.5).save(tmp_path / "folder"))
    modes = []

    class Mode(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_) -> None:
            modes.append(module.gpt.transformer.drop.training)

    trainer = pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[Mode()], **QUIET)
    trainer.fit(transformer, DataLoader(cached(4), batch_size=4))
    assert modes == [True]


# ---------------------------------------------------------------------------------------------------- language weights

LANGUAGE = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=60, bos_token_id=None, eos_token_id=None)


def language_model(path, **arguments) -> GPT2LMHeadModel:
    language = GPT2LMHeadModel(GPT2Config(**(LANGUAGE | dict(n_positions=40) | arguments)))
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    language.save_pretrained(path)
    return language


@torch.no_grad()
@pytest.mark.parametrize(("positions", "taken"), [(40, 16), (10, 10)])
def test_starting_from_language(tmp_path, positions, taken):
    """Blocks and last norm are GPT-2's: on the same vectors both compute the same."""
    language = language_model(tmp_path / "gpt2", n_positions=positions).transformer.eval()
    transformer = model(ema_decay=0.9).eval()
    before = weights_of(transformer.gpt)
    transformer.init_from_gpt2(tmp_path / "gpt2")
    x = torch.randn(2, taken, 32)
    ours = transformer.gpt.transformer(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours, language(inputs_embeds=x).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert torch.equal(transformer.gpt.transformer.wpe.weight[:taken], language.wpe.weight[:taken])
    kept = {"transformer.wte.weight", "head.weight", "clip_proj.weight", "clip_proj.bias"}
    assert set(before) - changed(transformer.gpt, before) == kept
    assert torch.equal(transformer.gpt.transformer.wpe.weight[taken:], before["transformer.wpe.weight"][taken:])
    assert not changed(transformer.eval_model, weights_of(transformer.gpt))  # the average begins there too


def test_grid_positions_stay(tmp_path):
    language_model(tmp_path / "gpt2")
    transformer = model(pos_embed_init="sincos_2d")
    before = transformer.gpt.transformer.wpe.weight.detach().clone()
    assert torch.equal(transformer.init_from_gpt2(tmp_path / "gpt2").gpt.transformer.wpe.weight, before)


def test_other_init_from_gpt2_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    language_model(tmp_path / "wide", n_embd=48)
    GPTNeoConfig().save_pretrained(tmp_path / "neo")
    (tmp_path / "empty").mkdir()
    language_model(tmp_path / "bare").config.save_pretrained(tmp_path / "config-only")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for name, message in {
        "wide": "model.n_embd must be 48, as in the language weights .*wide, got 32",
        "neo": "init_from_gpt2 must name a GPT-2, got .*neo, which is a gpt_neo",
        "empty": "init_from_gpt2 must name a GPT-2.* got .*empty",
        "config-only": "init_from_gpt2 must name a GPT-2 on the .*, got .*config-only: ",
        "damaged": "init_from_gpt2 must name a GPT-2 on the .*, got .*damaged: ",
        "none": "init_from_gpt2 must name a GPT-2 on the .*, got .*none: ",
    }.items():
        with pytest.raises(ValueError, match=message) as found:
            model().init_from_gpt2(tmp_path / name)
        assert "\n" not in str(found.value) and len(str(found.value)) < 450


# ------------------------------------------------------------------------------------------------- several processes

SIZES = [
    "data.batch_size=4",
    "data.train_size=64",
    "data.val_size=8",
    "trainer.max_steps=4",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.optimizer.learning_rate=1e-3",
    "model.optimizer.weight_decay=0.1",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "model.conditioning.drop_prob=0.3",
    "model.optimizer.warmup_steps=1",
    "model.optimizer.schedule=constant",
    "trainer.val_check_interval=4",
]


class Uneven(IterableDataset):
    """Of three items one rank has the first, and the other the rest."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items[1:] if dist.get_rank() else self.items[:1])


@pytest.mark.slow
def test_two_processes_validate_each_image_as_often(tmp_path):
    """Though one has more of them than the other, as of tar shards."""
    transformer, items = model(), cached(3)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", default_root_dir=tmp_path, **QUIET)
    (found,) = trainer.validate(transformer, DataLoader(Uneven(items), batch_size=2), verbose=False)
    indices, embedding = (torch.stack([item[name] for item in items]) for name in ("indices", "condition"))
    expected = F.cross_entropy(transformer.eval()(indices, embedding).flatten(0, 1), indices.flatten())
    assert found["val/cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["model.optimizer.name=adamw", "model.optimizer.ema_decay=0.5", "model.grad_checkpointing=true"],
        ["model.optimizer.name=muon", "model.clip_loss.weight=0.2", "model.optimizer.grad_clip=0.1"],
        pytest.param(
            ["model.optimizer.name=adamw", "trainer.precision=bf16-mixed", "model.optimizer.grad_accum_steps=2"],
            marks=needs_bf16,
        ),
    ],
    ids=["ema, checkpointing", "muon, clip loss, clipping", "bf16, accumulation"],
)
def test_fsdp_trains_what_ddp_trains(tmp_path, options):
    """Two processes that share the weights out end where two that hold all of them do; stopped and resumed, too."""
    make_vqgan(**VQGAN_SIZES).save(tmp_path / "vqgan")
    runs = {"ddp": ["trainer.strategy=ddp_find_unused_parameters_true"], "fsdp": ["trainer.strategy=fsdp"]}
    runs["half"] = [*runs["fsdp"], "trainer.max_steps=2"]
    runs["resumed"] = [*runs["fsdp"], "resume=half"]
    for name, strategy in runs.items():
        arguments = ["stage=transformer", *SIZES, *options, "vqgan=vqgan", *strategy, f"output={name}"]
        done = command("clipgen-train", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    checkpoints = {name: torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in runs}
    ddp, fsdp, half, resumed = (checkpoints[name]["state_dict"] for name in ("ddp", "fsdp", "half", "resumed"))
    assert ddp.keys() == fsdp.keys() == resumed.keys() and checkpoints["fsdp"]["global_step"] == 4
    half_precision = (
        "model.optimizer.name=muon" in options or "trainer.precision=bf16-mixed" in options
    )  # Muon's products
    for name, tensor in ddp.items():
        moved = (fsdp[name] - half[name]).float().norm()  # by the last two steps
        assert (fsdp[name] - tensor).float().norm() <= (0.2 if half_precision else 0.01) * moved, name
        torch.testing.assert_close(resumed[name], fsdp[name], atol=1e-6, rtol=1e-5)
    assert torch.equal(fsdp["gpt.head.weight"], fsdp["gpt.transformer.wte.weight"])  # tied still
    assert ConditionalTransformer.load(tmp_path / "fsdp").num_tokens == 16
