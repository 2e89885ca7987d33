"""Stage 2: losses, frozen models, sampling and files."""

from __future__ import annotations

import json
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import QUIET, changed, weights_of
from models import TRANSFORMER_SIZES, make_transformer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from clipgen.transformer import ConditionalTransformer


def model(**arguments) -> ConditionalTransformer:
    return make_transformer(**(TRANSFORMER_SIZES | arguments))


def embeddings(batch_size: int) -> Tensor:
    return F.normalize(torch.randn(batch_size, 64), dim=-1)


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(24, 16, 1024), (48, 24, 1536)])
def test_parameter_count_of_the_papers_sizes(n_layer, n_head, n_embd):
    """COCO's and ImageNet's model have as many parameters as the formula for GPT-2 gives."""
    with torch.device("meta"):
        transformer = make_transformer(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    block = 12 * n_embd**2 + 13 * n_embd
    outside = (16384 + 256) * n_embd + 2 * n_embd + (512 + 1) * n_embd  # codes, positions, last norm, CLIP projection
    assert sum(p.numel() for p in transformer.parameters()) == n_layer * block + outside
    assert transformer.gpt.transformer.wpe.weight.shape == (256, n_embd)


def test_default_is_the_papers_coco_model():
    with torch.device("meta"):
        millions = sum(p.numel() for p in make_transformer().parameters()) / 1e6
    assert 300 < millions < 325  # 307 M in the paper


# ------------------------------------------------------------------------------------------------------------- training


def test_transformer_memorizes_images(tiny_vqgan, shapes_clip, images):
    """The embedding identifies each of eight images, so the cross-entropy falls from about ln K towards 0."""
    transformer = model(learning_rate=1e-2, cond_drop_prob=0.0).attach_encoders(tiny_vqgan, shapes_clip)
    indices, e = transformer.encode_images(images)

    def cross_entropy() -> float:
        return F.cross_entropy(transformer(indices, e).flatten(0, 1), indices.flatten()).item()

    first = cross_entropy()
    data = DataLoader([{"images": image} for image in images], batch_size=8)
    trainer = pl.Trainer(max_steps=80, accelerator="cpu", **QUIET)
    trainer.fit(transformer, data)
    assert first == pytest.approx(math.log(16), abs=0.3) and cross_entropy() < 0.3
    assert torch.equal(transformer.sample(e, temperature=0), indices)
    trainer.validate(transformer, data, verbose=False)
    assert trainer.callback_metrics["val/cross_entropy"].item() == pytest.approx(cross_entropy(), abs=1e-4)


def test_encoders_stay_frozen_and_out_of_checkpoints(tmp_path, tiny_vqgan, shapes_clip, fit):
    transformer = model(clip_loss_weight=0.2).attach_encoders(tiny_vqgan, shapes_clip)
    before = [weights_of(module) for module in (tiny_vqgan, shapes_clip, transformer)]
    trainer = fit(transformer, 3)
    assert not changed(tiny_vqgan, before[0]) and not changed(shapes_clip, before[1])
    trained = {name for name, _ in transformer.named_parameters()}
    assert trained <= changed(transformer, before[2]) | {"gpt.null"}  # trained only if a condition is dropped
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(name.startswith("gpt.") for name in [*checkpoint["state_dict"], *trained])
    assert not tiny_vqgan.training and not shapes_clip.training
    assert not any(p.requires_grad for p in tiny_vqgan.parameters())
    assert not changed(ConditionalTransformer.load(tmp_path / "last.ckpt"), weights_of(transformer))


def test_loss_is_equations_8_to_10(tiny_vqgan, shapes_clip, images):
    """Cross-entropy plus 0.2 times -log((1 + cos) / 2) for the image of the most likely indices."""
    transformer = model(clip_loss_weight=0.2, cond_drop_prob=0.0).attach_encoders(tiny_vqgan, shapes_clip)
    transformer.log = lambda name, value, **_: logged.__setitem__(name, value)
    logged: dict[str, Tensor] = {}
    loss = transformer.training_step({"images": images}, 0)
    with torch.no_grad():
        indices = tiny_vqgan.encode(images).flatten(1)
        e = shapes_clip.encode_image(images)
        logits = transformer(indices, e)
        cross_entropy = -logits.log_softmax(-1).gather(-1, indices[..., None]).mean()
        generated = tiny_vqgan.decode(logits.argmax(-1).view(-1, 4, 4))
        similarity = (1 + F.cosine_similarity(shapes_clip.encode_image(generated), e)) / 2
    expected = cross_entropy - 0.2 * similarity.log().mean()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logged["train/cross_entropy"], cross_entropy, atol=1e-5, rtol=1e-5)


def test_clip_loss_has_gradients_only_for_the_transformer(tiny_vqgan, shapes_clip, images):
    transformer = model(cond_drop_prob=0.0).attach_encoders(tiny_vqgan, shapes_clip)
    indices, e = transformer.encode_images(images)
    transformer.clip_loss(transformer(indices, e), e).backward()
    for name, parameter in transformer.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name
    for encoder in (tiny_vqgan, shapes_clip):
        assert all(p.grad is None for p in encoder.parameters())


def test_minimizing_the_clip_loss_lowers_it(tiny_vqgan, shapes_clip, images):
    transformer = model(cond_drop_prob=0.0, tie_embeddings=False).attach_encoders(tiny_vqgan, shapes_clip)
    logits = torch.nn.Parameter(torch.randn(8, 16, 16))
    e = shapes_clip.encode_image(images)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = transformer.clip_loss(logits, e)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0]


def test_conditions_are_dropped_and_noisy_in_training_only(tiny_vqgan, shapes_clip, images, monkeypatch):
    """A quarter of the samples has no condition, and the noise has the configured cosine."""
    transformer = model(cond_drop_prob=0.25, cond_noise_cosine=0.5).attach_encoders(tiny_vqgan, shapes_clip)
    transformer.log = lambda *_, **__: None
    calls = []
    original = transformer.gpt.forward

    def record(indices: Tensor, condition: Tensor, drop: Tensor | None = None, with_loss: bool = False) -> Tensor:
        calls.append((condition, drop))
        return original(indices, condition, drop, with_loss)

    monkeypatch.setattr(transformer.gpt, "forward", record)
    for _ in range(50):
        transformer.training_step({"images": images}, 0)
    conditions, drops = (torch.cat(column) for column in zip(*calls))
    clean = shapes_clip.encode_image(images).repeat(50, 1)
    assert drops.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert (conditions * clean).sum(-1).mean().item() == pytest.approx(0.5, abs=0.03)
    calls.clear()
    transformer.validation_step({"images": images}, 0)
    assert torch.equal(calls[0][0], clean[:8]) and calls[0][1] is None


def test_weight_decay_applies_only_to_matrices(tiny_vqgan, shapes_clip, fit):
    transformer = model(weight_decay=0.1).attach_encoders(tiny_vqgan, shapes_clip)
    fit(transformer, 1)
    matrices, vectors = (group["params"] for group in transformer.optimizers().param_groups)
    assert all(p.ndim >= 2 for p in matrices) and all(p.ndim == 1 for p in vectors)
    assert len(matrices) + len(vectors) == len(list(transformer.parameters()))
    assert [group["weight_decay"] for group in transformer.optimizers().param_groups] == [0.1, 0.0]


def test_encoders_that_do_not_fit_are_refused(tiny_vqgan, shapes_clip, images):
    with pytest.raises(ValueError, match="codebook_size must be 16, as in the frozen models, got 17"):
        model(codebook_size=17).attach_encoders(tiny_vqgan, shapes_clip)
    with pytest.raises(ValueError, match="clip_dim must be 64, as in the frozen models, got 32"):
        model(clip_dim=32).attach_encoders(tiny_vqgan, shapes_clip)
    with pytest.raises(ValueError, match=r"num_tokens must be 16 for images of \(32, 32\), got 9"):
        model(num_tokens=9).attach_encoders(tiny_vqgan, shapes_clip).encode_images(images)
    with pytest.raises(RuntimeError, match=r"call transformer.attach_encoders\(vqgan, clip\) first"):
        model().training_step({"images": images}, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("drop_prob", 1.0), ("drop_prob", -0.1), ("noise_cosine", 0.0), ("noise_cosine", 1.1)],
)
def test_invalid_conditioning_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in .*, got {value}"):
        model(**{name: value})


# ------------------------------------------------------------------------------------------------------------- sampling


def test_sampling_matches_a_loop_of_full_forward_passes(tiny_transformer):
    """With probabilities in double precision and one uniform number per index."""
    e = embeddings(6)
    seeds = [3, 4, 5, 6, 7, 8]
    samples = tiny_transformer.sample(e, temperature=0.8, top_k=8, top_p=0.9, seed=3)
    uniforms = torch.stack([torch.rand(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    indices = torch.zeros(6, 16, dtype=torch.int64)
    with torch.no_grad():
        for t in range(16):
            p, order = (tiny_transformer(indices, e)[:, t] / 0.8).double().softmax(-1).sort(descending=True)
            p = p[:, :8] / p[:, :8].sum(-1, keepdim=True)
            p[p.cumsum(-1) - p >= 0.9] = 0
            cdf = p.cumsum(-1) / p.sum(-1, keepdim=True)
            indices[:, t] = order.gather(1, torch.searchsorted(cdf, uniforms[:, t : t + 1].double(), right=True))[:, 0]
    assert torch.equal(samples, indices)
    assert samples.shape == (6, 16) and samples.dtype == torch.int64 and len(samples.unique()) > 4


def test_sample_does_not_depend_on_its_batch(tiny_transformer):
    e = embeddings(5)
    together = tiny_transformer.sample(e, seed=10)
    for i in range(5):
        assert torch.equal(tiny_transformer.sample(e[i : i + 1], seed=10 + i)[0], together[i])
    assert torch.equal(tiny_transformer.sample(e[[3, 1]], seed=[13, 11]), together[[3, 1]])
    assert not torch.equal(tiny_transformer.sample(e, seed=11), together)
    assert not torch.equal(tiny_transformer.sample(e), tiny_transformer.sample(e))


def test_guidance_by_hand(tiny_transformer):
    e, other = embeddings(4), embeddings(4)

    def sample(e: Tensor, scale: float) -> Tensor:
        return tiny_transformer.sample(e, guidance_scale=scale, seed=1)

    assert torch.equal(sample(e, 1.0), tiny_transformer.sample(e, seed=1))
    assert torch.equal(sample(e, 0.0), sample(other, 0.0))  # only the null condition
    assert not torch.equal(sample(e, 3.0), sample(e, 1.0))
    # The first index by hand.
    gpt = tiny_transformer.gpt
    first = torch.zeros(4, 1, dtype=torch.int64)
    with torch.no_grad():
        logits, null = gpt(first, e)[:, 0], gpt(first, e, torch.ones(4, dtype=torch.bool))[:, 0]
    guided = tiny_transformer.sample(e, temperature=0, guidance_scale=3.0)[:, 0]
    assert torch.equal(guided, (null + 3 * (logits - null)).argmax(-1))


def test_guidance_needs_a_null_condition():
    transformer = model(cond_drop_prob=0.0)
    with pytest.raises(ValueError, match=r"train it with model\.conditioning\.drop_prob > 0"):
        transformer.sample(embeddings(1), guidance_scale=2.0)


def test_sampling_uses_no_dropout_and_keeps_training_mode():
    transformer = model(dropout=0.5).train()
    e = embeddings(3)
    assert torch.equal(transformer.sample(e, seed=0), transformer.sample(e, seed=0))
    assert transformer.training and transformer.gpt.transformer.drop.training


def test_sampling_under_bf16_autocast(tiny_transformer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = tiny_transformer.sample(embeddings(2), guidance_scale=2.0, seed=0)
    assert indices.shape == (2, 16) and indices.dtype == torch.int64


def test_invalid_sampling_settings_are_refused(tiny_transformer):
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 1.3"):
        tiny_transformer.sample(embeddings(1), top_p=1.3)
    with pytest.raises(ValueError, match="one for each of the 2 samples, got 3"):
        tiny_transformer.sample(embeddings(2), seed=[1, 2, 3])


# ---------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_save_and_load_are_bit_identical(tmp_path, tie_embeddings):
    transformer = model(tie_embeddings=tie_embeddings).eval()
    again = ConditionalTransformer.load(transformer.save(tmp_path / "transformer"))
    saved = load_file(tmp_path / "transformer" / "model.safetensors")
    assert ("gpt.head.weight" in saved) != tie_embeddings  # one tensor is stored once
    assert not again.training and dict(again.hparams) == json.loads(json.dumps(transformer.hparams))
    e = embeddings(2)
    indices = torch.randint(16, (2, 16))
    assert torch.equal(again(indices, e), transformer(indices, e))
    assert torch.equal(again.sample(e, seed=1), transformer.sample(e, seed=1))
    assert (again.gpt.head.weight is again.gpt.transformer.wte.weight) == tie_embeddings
