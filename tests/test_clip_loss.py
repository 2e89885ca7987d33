"""The CLIP loss (Eq. 9, 10): values by hand, gradients against finite differences, cost and effect."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import QUIET
from models import TRANSFORMER_SIZES, make_transformer
from torch import Tensor
from torch.utils.data import DataLoader

from clipgen import TextToImage
from clipgen.clip import FrozenCLIP
from clipgen.data.shapes import ShapesDataset
from clipgen.models import losses
from clipgen.models.config import CLIP_LOSS_ESTIMATORS, CLIP_LOSS_TYPES
from clipgen.transformer import ConditionalTransformer


def model(**arguments) -> ConditionalTransformer:
    return make_transformer(**(TRANSFORMER_SIZES | dict(cond_drop_prob=0.0) | arguments))


# ------------------------------------------------------------------------------------------------------ plain functions


def test_clip_loss_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # cosines 1 and 0.6, similarities 1 and 0.8
    assert losses.clip_loss(a, b).item() == pytest.approx(-math.log(0.8) / 2)
    assert losses.clip_loss(a, b, "cosine").item() == pytest.approx(0.2)
    assert math.log(1e3) < losses.clip_loss(a, -a) < 20  # s = 0
    with pytest.raises(ValueError, match=r"clip_loss\.type must be 'log' or 'cosine', got 'l2'"):
        losses.clip_loss(a, b, "l2")


@pytest.mark.parametrize("estimator", CLIP_LOSS_ESTIMATORS)
def test_codes_and_their_gradients_by_hand(estimator):
    """d (p @ C) / d logits = p * (g - sum p g), where g is the upstream gradient times the codebook."""
    logits, codebook = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True), torch.randn(5, 4).double()
    upstream = torch.randn(2, 3, 4).double()
    torch.manual_seed(3)
    codes = losses.differentiable_codes(logits, codebook, estimator)
    (gradient,) = torch.autograd.grad(codes, logits, upstream)
    torch.manual_seed(3)
    noise = -torch.empty(2, 3, 5).double().exponential_().log() if estimator == "gumbel" else 0.0
    p = (logits + noise).softmax(-1).detach()
    g = upstream @ codebook.T
    torch.testing.assert_close(gradient, p * (g - (p * g).sum(-1, keepdim=True)))
    expected = p @ codebook if estimator == "expected" else codebook[p.argmax(-1)]
    torch.testing.assert_close(codes.detach(), expected)


def test_gumbel_estimator_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    frequency = losses.differentiable_codes(logits.expand(1, 20_000, 4), torch.eye(4), "gumbel")[0].mean(0)
    torch.testing.assert_close(frequency, logits.softmax(0), atol=0.015, rtol=0)


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match=r"clip_loss.estimator must be one of straight_through, .*, got 'hard'"):
        losses.differentiable_codes(torch.zeros(1, 1, 2), torch.zeros(2, 1), "hard")


# --------------------------------------------------------------------------------------------- through decoder and CLIP


class DoubleCLIP:
    """The bundled CLIP in double precision; FrozenCLIP returns single precision."""

    def __init__(self) -> None:
        self.clip = FrozenCLIP("shapes").double()

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.clip.model.encode_image(self.clip.preprocess(images)), dim=-1)


@pytest.mark.parametrize("loss_type", CLIP_LOSS_TYPES)
def test_gradient_matches_finite_differences(loss_type, tiny_vqgan, shapes_clip, images):
    transformer = model(clip_loss_estimator="expected", clip_loss_type=loss_type).attach_encoders(
        tiny_vqgan, shapes_clip
    )
    target = shapes_clip.encode_image(images[:2]).double()
    transformer._encoders = (tiny_vqgan.double(), DoubleCLIP())
    logits = torch.randn(2, 16, 16, dtype=torch.double, requires_grad=True)
    loss = lambda logits: transformer.clip_loss(logits, target)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    with torch.no_grad():
        for seed in range(4):
            direction = F.normalize(torch.randn(logits.numel(), generator=torch.Generator().manual_seed(seed)), dim=0)
            step = 1e-4 * direction.double().view_as(logits)
            slope = (loss(logits + step) - loss(logits - step)) / 2e-4
            assert slope.item() == pytest.approx((gradient * step).sum().item() / 1e-4, rel=1e-4, abs=1e-9)
    assert gradient.abs().max() > 1e-6


def record_decoded_batches(transformer: ConditionalTransformer, monkeypatch) -> list[int]:
    """Return a list that receives the batch size of each call of the decoder."""
    vqgan = transformer.encoders()[0]
    original = vqgan.decode_latents
    batch_sizes = []

    def decode_latents(z_q: Tensor) -> Tensor:
        batch_sizes.append(len(z_q))
        return original(z_q)

    monkeypatch.setattr(vqgan, "decode_latents", decode_latents)
    return batch_sizes


@pytest.mark.parametrize(
    ("options", "grad_accum_steps", "expected"),
    [
        ({}, 1, [8] * 4),
        (dict(clip_loss_interval=2), 1, [8, 8]),
        (dict(clip_loss_interval=2), 2, [8] * 4),
        (dict(clip_loss_batch_fraction=0.5), 1, [4] * 4),
        (dict(clip_loss_batch_fraction=0.01, clip_loss_interval=3), 1, [1, 1]),
    ],
)
def test_interval_and_batch_fraction_limit_decoding(
    options, grad_accum_steps, expected, tiny_vqgan, shapes_clip, fit, monkeypatch
):
    """Of four optimizer steps, every n-th decodes the first samples of all its accumulated batches."""
    transformer = model(clip_loss_weight=0.2, **options).attach_encoders(tiny_vqgan, shapes_clip)
    batch_sizes = record_decoded_batches(transformer, monkeypatch)
    data = DataLoader(ShapesDataset(32 * grad_accum_steps), batch_size=8)
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", accumulate_grad_batches=grad_accum_steps, **QUIET)
    trainer.fit(transformer, data)
    assert trainer.global_step == 4 and batch_sizes == expected


def test_interval_multiplies_the_weight(tiny_vqgan, shapes_clip, images):
    """Averaged over steps, the loss is Eq. 10 for any interval."""
    weights = []
    for interval in (1, 4):
        torch.manual_seed(1)
        transformer = model(clip_loss_weight=0.2, clip_loss_interval=interval).attach_encoders(tiny_vqgan, shapes_clip)
        logged = {}
        transformer.log = lambda name, value, logged=logged, **_: logged.__setitem__(name, value.item())
        loss = transformer.training_step({"images": images}, 0).item()
        weights.append((loss - logged["train/cross_entropy"]) / logged["train/clip_loss"])
    assert weights == pytest.approx([0.2, 0.8], rel=1e-3)


def test_sum_reduction_adds_the_cross_entropy_of_all_tokens(tiny_vqgan, shapes_clip, images):
    """Eq. 8 and 10 as printed: -log p(s) of the sequence, plus lambda times the CLIP loss."""
    torch.manual_seed(1)
    arguments = dict(model(clip_loss_weight=0.2).hparams) | {"loss_reduction": "sum"}
    transformer = ConditionalTransformer(**arguments).attach_encoders(tiny_vqgan, shapes_clip)
    logged = {}
    transformer.log = lambda name, value, **_: logged.__setitem__(name, value.item())
    loss = transformer.training_step({"images": images}, 0).item()
    expected = transformer.num_tokens * logged["train/cross_entropy"] + 0.2 * logged["train/clip_loss"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="loss_reduction must be one of mean, sum, got 'median'"):
        ConditionalTransformer(**arguments | {"loss_reduction": "median"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clip_loss_estimator", "hard", "be one of straight_through, gumbel, expected, got 'hard'"),
        ("clip_loss_type", "l2", "be one of log, cosine, got 'l2'"),
        ("clip_loss_interval", 0, "be at least 1, got 0"),
        ("clip_loss_batch_fraction", 0.0, r"be in \(0, 1\], got 0.0"),
        ("clip_loss_batch_fraction", 1.5, r"be in \(0, 1\], got 1.5"),
    ],
)
def test_invalid_settings_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"{name.replace('clip_loss_', 'clip_loss.')} must {message}"):
        model(**{name: value})


@pytest.mark.slow
def test_minimizing_the_loss_reduces_the_clip_distance_of_samples():
    """Optimize the logits of eight images by the loss alone, through the bundled decoder and CLIP, and sample codes.

    In a training, the effect beside the cross-entropy is as small as its variation between seeds.
    """
    pipe = TextToImage.load("shapes")
    transformer = make_transformer(
        n_layer=1,
        n_head=1,
        n_embd=8,
        codebook_size=512,
        num_tokens=64,
        clip_dim=64,
        clip_loss_estimator="gumbel",
        clip_loss_type="cosine",
    ).attach_encoders(pipe.vqgan, pipe.clip)
    images = ShapesDataset(8, seed=1).render(range(8))
    embedding = pipe.clip.encode_image(images).detach()
    logits = torch.zeros(8, 64, 512, requires_grad=True)

    @torch.no_grad()
    def distance() -> float:
        samples = torch.multinomial(logits.softmax(-1).flatten(0, 1), 8, replacement=True)  # (8 * 64, 8)
        grids = samples.T.reshape(8 * 8, 8, 8)
        return losses.clip_loss(
            pipe.clip.encode_image(pipe.vqgan.decode(grids)), embedding.repeat(8, 1), "cosine"
        ).item()

    before = distance()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(25):
        optimizer.zero_grad()
        transformer.clip_loss(logits, embedding).backward()
        optimizer.step()
    assert distance() < 0.8 * before
