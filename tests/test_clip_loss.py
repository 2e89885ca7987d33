"""L_CLIP (Eq. 9, 10): its kinds by hand, its gradient against finite differences, what it costs and what it is for."""

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


def test_kinds_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # cosines 1 and 0.6, similarities 1 and 0.8
    assert losses.clip_loss(a, b).item() == pytest.approx(-math.log(0.8) / 2)
    assert losses.clip_loss(a, b, "cosine").item() == pytest.approx(0.2)
    assert math.log(1e3) < losses.clip_loss(a, -a) < 20  # s = 0
    with pytest.raises(ValueError, match="clip_loss.type must be 'log' or 'cosine', got 'l2'"):
        losses.clip_loss(a, b, "l2")


@pytest.mark.parametrize("kind", CLIP_LOSS_ESTIMATORS)
def test_codes_and_their_gradients_by_hand(kind):
    """d (p @ C) / d logits = p * (g - sum p g), where g is what the code's gradient makes of each code."""
    logits, codebook = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True), torch.randn(5, 4).double()
    upstream = torch.randn(2, 3, 4).double()
    torch.manual_seed(3)
    codes = losses.differentiable_codes(logits, codebook, kind)
    (found,) = torch.autograd.grad(codes, logits, upstream)
    torch.manual_seed(3)
    noise = -torch.empty(2, 3, 5).double().exponential_().log() if kind == "gumbel" else 0.0
    p = (logits + noise).softmax(-1).detach()
    g = upstream @ codebook.T
    torch.testing.assert_close(found, p * (g - (p * g).sum(-1, keepdim=True)))
    expected = p @ codebook if kind == "expected" else codebook[p.argmax(-1)]
    torch.testing.assert_close(codes.detach(), expected)


def test_gumbel_draws_by_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = losses.differentiable_codes(logits.expand(1, 20_000, 4), torch.eye(4), "gumbel")[0].mean(0)
    torch.testing.assert_close(drawn, logits.softmax(0), atol=0.015, rtol=0)


def test_unknown_codes_are_refused():
    with pytest.raises(ValueError, match=r"clip_loss.estimator must be one of straight_through, .*, got 'hard'"):
        losses.differentiable_codes(torch.zeros(1, 1, 2), torch.zeros(2, 1), "hard")


# --------------------------------------------------------------------------------------------- through decoder and CLIP


class DoubleCLIP:
    """The bundled CLIP in double precision: FrozenCLIP itself returns single."""

    def __init__(self) -> None:
        self.clip = FrozenCLIP("shapes").double()

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.clip.model.encode_image(self.clip.preprocess(images)), dim=-1)


@pytest.mark.parametrize("kind", CLIP_LOSS_TYPES)
def test_the_gradient_is_that_of_finite_differences(kind, tiny_vqgan, shapes_clip, images):
    transformer = model(clip_loss_estimator="expected", clip_loss_type=kind).attach_encoders(tiny_vqgan, shapes_clip)
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


def spied(transformer: ConditionalTransformer, monkeypatch) -> list[int]:
    """Rows of every call of the decoder."""
    vqgan, rows = transformer.encoders()[0], []
    original = vqgan.decode_latents
    monkeypatch.setattr(vqgan, "decode_latents", lambda z_q: (rows.append(len(z_q)), original(z_q))[1])
    return rows


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
def test_what_is_not_asked_for_is_not_decoded(
    options, grad_accum_steps, expected, tiny_vqgan, shapes_clip, fit, monkeypatch
):
    """Four optimizer steps: every n-th, with all batches that add up to it; of each batch the first rows."""
    transformer = model(clip_loss_weight=0.2, **options).attach_encoders(tiny_vqgan, shapes_clip)
    rows = spied(transformer, monkeypatch)
    data = DataLoader(ShapesDataset(32 * grad_accum_steps), batch_size=8)
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", accumulate_grad_batches=grad_accum_steps, **QUIET)
    trainer.fit(transformer, data)
    assert trainer.global_step == 4 and rows == expected


def test_a_rare_loss_weighs_more(tiny_vqgan, shapes_clip, images):
    """On average over steps, Eq. 10 stays."""
    found = []
    for every in (1, 4):
        torch.manual_seed(1)
        transformer = model(clip_loss_weight=0.2, clip_loss_interval=every).attach_encoders(tiny_vqgan, shapes_clip)
        logged = {}
        transformer.log = lambda name, value, logged=logged, **_: logged.__setitem__(name, value.item())
        loss = transformer.training_step({"images": images}, 0).item()
        found.append((loss - logged["train/cross_entropy"]) / logged["train/clip_loss"])
    assert found == pytest.approx([0.2, 0.8], rel=1e-3)


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
def test_senseless_arguments_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"{name.replace('clip_loss_', 'clip_loss.')} must {message}"):
        model(**{name: value})


@pytest.mark.slow
def test_descending_its_gradient_brings_samples_nearer():
    """Logits of eight images descend the loss alone, through the bundled decoder and CLIP; then codes are sampled.

    What a training makes of it beside the cross-entropy varies from seed to seed as much as the effect is large.
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
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 8, replacement=True)  # (8 * 64, 8)
        grids = drawn.T.reshape(8 * 8, 8, 8)
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
