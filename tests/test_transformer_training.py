"""Training of stage 2: EMA, memory, gradient accumulation, precision, initialization and several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import torchrun
from conftest import QUIET, changed, needs_bf16, weights_of
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig

from clipgen import TextToImage
from clipgen.data.shapes import ShapesDataset
from clipgen.hardware.processor import has_bf16_units
from clipgen.transformer import ConditionalTransformer


def model(**arguments) -> ConditionalTransformer:
    return make_transformer(**(TRANSFORMER_SIZES | dict(cond_drop_prob=0.0) | arguments))


def embeddings(num_items: int) -> Tensor:
    return F.normalize(torch.randn(num_items, 64), dim=-1)


def cached(num_items: int) -> list[dict[str, Tensor]]:
    """Return items like those of the token cache."""
    e = embeddings(num_items)
    indices = torch.randint(16, (num_items, 16))
    return [{"indices": i, "condition": c} for i, c in zip(indices, e)]


# ------------------------------------------------------------------------------------------------------------------ EMA


class RecordWeights(pl.Callback):
    """Record the weights after each batch."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.weights.append(weights_of(module.gpt))


@torch.no_grad()
def test_evaluation_and_files_use_the_ema(tmp_path):
    """The first step copies the weights; then ema = decay * ema + (1 - decay) * weights."""
    transformer = model(ema_decay=0.7, learning_rate=1e-2)
    recorded = RecordWeights()
    data = DataLoader(cached(12), batch_size=4)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[recorded], **QUIET)
    with torch.enable_grad():
        trainer.fit(transformer, data)
    first, second, third = recorded.weights
    for name, average in transformer.eval_model.state_dict().items():
        expected = 0.7 * (0.7 * first[name] + 0.3 * second[name]) + 0.3 * third[name]
        torch.testing.assert_close(average, expected)
    assert transformer.eval_model is not transformer.gpt
    assert transformer.eval_model.head.weight is transformer.eval_model.transformer.wte.weight  # also tied

    e = embeddings(3)
    indices = torch.randint(16, (3, 16))
    logits = transformer.eval_model(indices, e)
    samples = transformer.eval().sample(e, seed=0)
    assert torch.equal(transformer(indices, e), logits) and not torch.equal(transformer.gpt(indices, e), logits)
    assert torch.equal(transformer.train()(indices, e), transformer.gpt(indices, e))
    without_ema = model()
    without_ema.gpt.load_state_dict(transformer.eval_model.state_dict())
    assert torch.equal(without_ema.sample(e, seed=0), samples)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for path in (transformer.save(tmp_path / "folder"), tmp_path / "last.ckpt"):
        again = ConditionalTransformer.load(path)
        assert torch.equal(again(indices, e), logits) and torch.equal(again.sample(e, seed=0), samples)
    folder = ConditionalTransformer.load(tmp_path / "folder")
    assert folder.ema is None and set(folder.state_dict()) == set(without_ema.state_dict())  # one network, not two
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["arguments"]["optimizer"]["ema_decay"] == 0.7

    trainer.validate(transformer, data, verbose=False)
    batch = next(iter(DataLoader(data.dataset, batch_size=12)))
    logits = transformer.eval_model(batch["indices"], batch["condition"])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["indices"].flatten())
    assert trainer.callback_metrics["val/cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_ema_is_not_trained():
    transformer = model(ema_decay=0.9, optimizer_name="muon")
    pl.Trainer(max_steps=1, accelerator="cpu", **QUIET).fit(transformer, DataLoader(cached(4), batch_size=4))
    trained = {id(p) for group in transformer.optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in transformer.gpt.parameters()}


def test_exported_folder_has_the_fingerprint_of_its_checkpoint(tmp_path, tiny_vqgan, shapes_clip):
    """Images record the fingerprint of the weights that generated them."""
    transformer = model(ema_decay=0.9)
    torch.nn.init.normal_(transformer.gpt.clip_proj.weight)  # now different from the EMA weights
    folder = ConditionalTransformer.load(transformer.save(tmp_path / "transformer"))
    first, second = (TextToImage(tiny_vqgan, t, shapes_clip).fingerprint for t in (transformer, folder))
    assert first == second


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_invalid_ema_decay_is_refused(value):
    with pytest.raises(ValueError, match=rf"ema_decay must be in \[0, 1\), got {value}"):
        model(ema_decay=value)


# ----------------------------------------------------------------------------------------------------- memory and speed


def gradients_of(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class RecordGradients(pl.Callback):
    """Record the gradients of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.gradients = self.gradients or gradients_of(module)


def first_gradients(batch: int = 8, grad_accum_steps: int = 1, **options) -> dict[str, Tensor]:
    """Return the gradients of the first step of a training, from the same weights and items."""
    torch.manual_seed(5)
    transformer = model(**options)
    recorded = RecordGradients()
    data = DataLoader(cached(8), batch_size=batch)
    settings = dict(
        max_steps=1, accelerator="cpu", callbacks=[recorded], accumulate_grad_batches=grad_accum_steps, **QUIET
    )
    pl.Trainer(**settings).fit(transformer, data)
    return recorded.gradients


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected) and actual  # compiled modules keep their names
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_grad_checkpointing_recomputes_blocks_with_equal_gradients(dropout):
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
    assert_gradients_close(first_gradients(grad_checkpointing=True, dropout=dropout), first_gradients(dropout=dropout))


@pytest.mark.slow
def test_compiled_training_matches_uncompiled(tmp_path):
    assert_gradients_close(first_gradients(compile=True), first_gradients())
    losses = []
    for option in (False, True):
        torch.manual_seed(5)
        transformer = model(compile=option, ema_decay=0.5, learning_rate=1e-3)
        trainer = pl.Trainer(max_steps=4, accelerator="cpu", **QUIET)
        data = DataLoader(cached(16), batch_size=4)
        trainer.fit(transformer, data, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        losses.append(trainer.callback_metrics["val/cross_entropy"].item())
        ConditionalTransformer.load(tmp_path / "last.ckpt")  # an ordinary checkpoint
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_accumulated_batches_equal_one_larger_batch():
    assert_gradients_close(first_gradients(batch=4, grad_accum_steps=2), first_gradients(batch=8))


class RecordLearningRates(pl.Callback):
    """Record the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_schedule_counts_optimizer_steps():
    """With twelve batches and two batches per step, the warm-up ends after two steps and the cosine after six."""
    recorded = RecordLearningRates()
    transformer = model(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, callbacks=[recorded], **QUIET)
    trainer.fit(transformer, DataLoader(cached(24), batch_size=2))
    cosine = [0.5 * (1 + torch.tensor(torch.pi * step / 4).cos().item()) for step in range(4)]
    assert trainer.global_step == 6 and recorded.rates == pytest.approx([0.5, 1.0, *cosine], abs=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipped_gradients_keep_their_direction(precision):
    transformer = model()
    recorded = RecordGradients()
    clipped: dict[str, Tensor] = {}

    class RecordClippedGradients(pl.Callback):
        """Record gradients after the step, because Lightning's hooks run before clipping."""

        def on_train_start(self, trainer, module) -> None:
            trainer.optimizers[0].register_step_post_hook(lambda *_: clipped.update(gradients_of(module)))

    options = dict(max_steps=1, accelerator="cpu", precision=precision, gradient_clip_val=0.01) | QUIET
    trainer = pl.Trainer(callbacks=[recorded, RecordClippedGradients()], **options)
    trainer.fit(transformer, DataLoader(cached(4), batch_size=4))
    norm = torch.cat([g.flatten() for g in recorded.gradients.values()]).norm()
    assert norm > 0.1
    assert_gradients_close(clipped, {name: gradient * 0.01 / norm for name, gradient in recorded.gradients.items()})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_training_matches_fp32(tiny_vqgan, shapes_clip, optimizer):
    """Weights, EMA and the logged loss stay in fp32."""
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(5)
        transformer = model(
            clip_loss_weight=0.2,
            clip_loss_estimator="gumbel",
            ema_decay=0.5,
            optimizer_name=optimizer,
            learning_rate=1e-2,
        ).attach_encoders(tiny_vqgan, shapes_clip)
        trainer = pl.Trainer(max_steps=6, accelerator="cpu", precision=precision, **QUIET)
        data = DataLoader(ShapesDataset(48, seed=3), batch_size=8)
        trainer.fit(transformer, data, DataLoader(ShapesDataset(16, seed=4), batch_size=8))
        losses[precision] = trainer.callback_metrics["val/cross_entropy"].item()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in transformer.parameters())
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


def test_loaded_model_trains_with_dropout(tmp_path):
    """Loading returns a model in evaluation mode, which Lightning does not change."""
    transformer = ConditionalTransformer.load(model(dropout=0.5).save(tmp_path / "folder"))
    modes = []

    class Mode(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_) -> None:
            modes.append(module.gpt.transformer.drop.training)

    trainer = pl.Trainer(max_steps=1, accelerator="cpu", callbacks=[Mode()], **QUIET)
    trainer.fit(transformer, DataLoader(cached(4), batch_size=4))
    assert modes == [True]


# ---------------------------------------------------------------------------------------------- initialized from GPT-2

LANGUAGE = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=60, bos_token_id=None, eos_token_id=None)


def language_model(path, **arguments) -> GPT2LMHeadModel:
    language = GPT2LMHeadModel(GPT2Config(**(LANGUAGE | dict(n_positions=40) | arguments)))
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    language.save_pretrained(path)
    return language


@torch.no_grad()
@pytest.mark.parametrize(("positions", "num_copied"), [(40, 16), (10, 10)])
def test_init_from_gpt2_copies_blocks_and_positions(tmp_path, positions, num_copied):
    """Blocks and last norm give the same outputs for the same inputs."""
    language = language_model(tmp_path / "gpt2", n_positions=positions).transformer.eval()
    transformer = model(ema_decay=0.9).eval()
    before = weights_of(transformer.gpt)
    transformer.init_from_gpt2(tmp_path / "gpt2")
    x = torch.randn(2, num_copied, 32)
    ours = transformer.gpt.transformer(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours, language(inputs_embeds=x).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert torch.equal(transformer.gpt.transformer.wpe.weight[:num_copied], language.wpe.weight[:num_copied])
    kept = {"transformer.wte.weight", "head.weight", "clip_proj.weight", "clip_proj.bias"}
    assert set(before) - changed(transformer.gpt, before) == kept
    assert torch.equal(
        transformer.gpt.transformer.wpe.weight[num_copied:], before["transformer.wpe.weight"][num_copied:]
    )
    assert not changed(transformer.eval_model, weights_of(transformer.gpt))  # the EMA is initialized, too


def test_init_from_gpt2_keeps_sincos_positions(tmp_path):
    language_model(tmp_path / "gpt2")
    transformer = model(pos_embed_init="sincos_2d")
    before = transformer.gpt.transformer.wpe.weight.detach().clone()
    assert torch.equal(transformer.init_from_gpt2(tmp_path / "gpt2").gpt.transformer.wpe.weight, before)


def test_unusable_gpt2_is_refused(tmp_path, monkeypatch):
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
        with pytest.raises(ValueError, match=message) as error:
            model().init_from_gpt2(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 450


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
    """One rank has the first of three items, and the other rank has the rest."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items[1:] if dist.get_rank() else self.items[:1])


@pytest.mark.slow
def test_validation_loss_is_per_sample_on_unequal_ranks(tmp_path):
    """Ranks have unequal numbers of samples when they read tar shards."""
    transformer = model()
    items = cached(3)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", default_root_dir=tmp_path, **QUIET)
    (metrics,) = trainer.validate(transformer, DataLoader(Uneven(items), batch_size=2), verbose=False)
    indices, embedding = (torch.stack([item[name] for item in items]) for name in ("indices", "condition"))
    expected = F.cross_entropy(transformer.eval()(indices, embedding).flatten(0, 1), indices.flatten())
    assert metrics["val/cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)


SHARDED = {
    "ema, checkpointing": [
        "model.optimizer.name=adamw",
        "model.optimizer.ema_decay=0.5",
        "model.grad_checkpointing=true",
    ],
    "muon, clip loss, clipping": [
        "model.optimizer.name=muon",
        "model.clip_loss.weight=0.2",
        "model.optimizer.grad_clip=0.1",
    ],
    "bf16, accumulation": [
        "model.optimizer.name=adamw",
        "trainer.precision=bf16-mixed",
        "model.optimizer.grad_accum_steps=2",
    ],
}
# Several trainings in one pair of processes, because most of the time is spent on starting them.
COMMANDS = """
import sys
from clipgen.cli import train
for arguments in {commands!r}:
    sys.argv = ["clipgen-train", *arguments]
    try:
        train.main()
    except SystemExit as exit:
        if exit.code:
            raise
"""


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory) -> Path:
    """Train with all options of ``SHARDED`` under DDP and FSDP, and with an interruption under FSDP."""
    folder = tmp_path_factory.mktemp("sharded")
    make_vqgan(**VQGAN_SIZES).save(folder / "vqgan")
    runs = {
        "ddp": ["trainer.strategy=ddp_find_unused_parameters_true"],
        "fsdp": ["trainer.strategy=fsdp"],
        "half": ["trainer.strategy=fsdp", "trainer.max_steps=2"],
        "resumed": ["trainer.strategy=fsdp", "resume={half}"],
    }
    commands = []
    for number, (name, options) in enumerate(SHARDED.items()):
        if name.startswith("bf16") and not has_bf16_units("cpu"):
            continue
        for run, more in runs.items():
            more = [argument.format(half=f"{number}/half") for argument in more]
            commands.append(["stage=transformer", *SIZES, *options, "vqgan=vqgan", *more, f"output={number}/{run}"])
    (folder / "commands.py").write_text(COMMANDS.format(commands=commands))
    done = torchrun(folder, ["--nproc-per-node=2"], "commands.py")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_bf16 if name.startswith("bf16") else ()) for name in SHARDED]
)
def test_fsdp_matches_ddp_and_resumes(sharded_runs, name):
    folder = sharded_runs / str(list(SHARDED).index(name))
    states = {}
    for run in ("ddp", "fsdp", "half", "resumed"):
        checkpoint = torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == (2 if run == "half" else 4)
        states[run] = checkpoint["state_dict"]
    ddp, fsdp, half, resumed = states.values()
    assert ddp.keys() == fsdp.keys() == resumed.keys()
    # Muon may iterate in bfloat16.
    half_precision = name != "ema, checkpointing"
    for key, tensor in ddp.items():
        moved = (fsdp[key] - half[key]).float().norm()  # in the last two steps
        assert (fsdp[key] - tensor).float().norm() <= (0.2 if half_precision else 0.01) * moved, key
        torch.testing.assert_close(resumed[key], fsdp[key], atol=1e-6, rtol=1e-5)
    assert torch.equal(fsdp["gpt.head.weight"], fsdp["gpt.transformer.wte.weight"])  # still tied
    assert ConditionalTransformer.load(folder / "fsdp").num_tokens == 16
