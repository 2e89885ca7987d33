"""Stage 1: encoding, training steps of generator and discriminator, validation and files."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, changed, weights_of
from models import VQGAN_SIZES, make_vqgan
from torch.utils.data import DataLoader, IterableDataset

from clipgen.data.shapes import ShapesDataset
from clipgen.models import losses
from clipgen.models.discriminator import average_statistics
from clipgen.models.quantizers.vector import VectorQuantizer
from clipgen.vqgan import VQGAN


def model(**arguments) -> VQGAN:
    return make_vqgan(**(VQGAN_SIZES | arguments))


def gan(**arguments) -> VQGAN:
    return model(**(dict(gan_weight=0.8, gan_start_step=0) | arguments))


class RecordBatches(pl.Callback):
    """Record the global step and the discriminator's weights before each batch."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.steps = []
        self.discriminators = []

    def on_train_batch_start(self, trainer, module, *_) -> None:
        self.num_batches += 1
        self.steps.append(trainer.global_step)
        if module.discriminator is not None:
            self.discriminators.append(weights_of(module.discriminator))


# --------------------------------------------------------------------------------------------------- images <-> indices


@torch.no_grad()
def test_encode_and_decode_shapes(tiny_vqgan, images):
    indices = tiny_vqgan.encode(images)
    assert indices.shape == (8, 4, 4) and indices.dtype == torch.int64 and len(indices.unique()) > 4
    assert tiny_vqgan.encode_latents(images).shape == (8, 8, 4, 4)
    reconstruction = tiny_vqgan(images)
    assert tiny_vqgan.decode(indices).shape == images.shape
    torch.testing.assert_close(tiny_vqgan.decode(indices), reconstruction, atol=1e-5, rtol=1e-5)


def test_any_size_divisible_by_f_is_accepted(tiny_vqgan):
    assert tiny_vqgan.encode(torch.zeros(1, 3, 16, 40)).shape == (1, 2, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_encode_and_decode_in_other_dtypes(tiny_vqgan, images, dtype):
    vqgan = copy.deepcopy(tiny_vqgan).to(dtype)
    indices = vqgan.encode(images.to(dtype))
    assert (indices == tiny_vqgan.encode(images)).float().mean() > 0.9
    assert vqgan(images.to(dtype)).dtype == vqgan.decode(indices).dtype == dtype


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5,), torch.float), ((3, 32, 32), torch.float), ((1, 1, 32, 32), torch.float), ((1, 3, 32, 32), torch.uint8)],
)
def test_invalid_image_batches_are_refused(tiny_vqgan, shape, dtype):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) floats in \[-1, 1\], got \w+ of \("):
        tiny_vqgan.encode(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 33)])
def test_error_for_indivisible_sizes_suggests_sizes(tiny_vqgan, shape):
    with pytest.raises(ValueError, match=r"sides divisible by 8, got \(.*\); try a height of .* and a width of"):
        tiny_vqgan.encode(torch.zeros(shape))


def test_invalid_options_are_refused_by_the_constructor():
    """Rather than at step 25,000, when the discriminator is first used."""
    for name, value in (("gan.loss", "wgan"), ("loss.reconstruction", "l3"), ("quantizer.type", "l1")):
        section, field = name.split(".")
        with pytest.raises(ValueError, match=f"{name} must be .* got '{value}'"):
            VQGAN(**{section: {field: value}})


# ------------------------------------------------------------------------------------------------------------- training


def test_step_trains_all_networks(fit):
    vqgan = gan(dead_code_reset_after=0, gan_loss="log")  # the two hinge terms cancel at the last bias
    before = weights_of(vqgan)
    fit(vqgan, 1)
    moved = changed(vqgan, before)
    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv", "discriminator"):
        names = {name for name, _ in vqgan.named_parameters() if name.startswith((f"{part}.", f"autoencoder.{part}."))}
        assert names and names <= moved, part
    assert "autoencoder.quantize.embedding.weight" in moved


def test_ema_codes_have_no_optimizer(fit):
    vqgan = gan(codebook_ema_decay=0.9, dead_code_reset_after=0)
    before = weights_of(vqgan)
    fit(vqgan, 2, batch=4)
    assert "autoencoder.quantize.embedding.weight" in changed(vqgan, before)
    optimized = [p for optimizer in vqgan.optimizers() for p in optimizer.param_groups[0]["params"]]
    assert len(optimized) == len(list(vqgan.parameters())) - 1
    assert not any(p is vqgan.autoencoder.quantize.embedding.weight for p in optimized)


def test_max_steps_counts_batches(fit):
    for vqgan in (gan(), model()):
        recorded = RecordBatches()
        trainer = fit(vqgan, 10, recorded, batch=2)
        assert trainer.global_step == recorded.num_batches == 10 and recorded.steps == list(range(10))


def test_discriminator_is_not_trained_before_start_step(fit):
    recorded = RecordBatches()
    trainer = fit(gan(gan_start_step=3), 5, recorded, batch=4)
    before = recorded.discriminators
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(before)]
    assert same == [True, True, True, False]  # steps 0, 1, 2 leave it alone, step 3 does not
    assert {"train/discriminator_loss", "train/generator_loss", "train/adaptive_weight"} <= set(
        trainer.callback_metrics
    )


def test_inactive_discriminator_is_not_in_the_loss(fit):
    inactive = fit(gan(gan_start_step=100), 2, batch=4).callback_metrics
    absent = fit(model(), 2, batch=4).callback_metrics
    for metrics in (inactive, absent):
        assert "train/generator_loss" not in metrics and "train/discriminator_loss" not in metrics
        terms = [metrics[f"train/{name}_loss"] for name in ("reconstruction", "codebook", "commitment")]
        torch.testing.assert_close(metrics["train/loss"], sum(terms))


def test_active_discriminator_is_in_the_loss(fit):
    metrics = fit(gan(), 1, batch=4).callback_metrics
    terms = sum(metrics[f"train/{name}_loss"] for name in ("reconstruction", "codebook", "commitment"))
    adversarial = metrics["train/adaptive_weight"] * metrics["train/generator_loss"]
    torch.testing.assert_close(metrics["train/loss"], terms + adversarial)
    assert adversarial.abs() > 1e-4


def test_disc_only_steps_do_not_change_the_generator(fit):
    """The generator is bit-identical to one that is trained without discriminator."""
    trained = []
    for start_step in (0, 100):
        torch.manual_seed(1)
        vqgan = gan(gan_start_step=start_step, gan_disc_only_steps=100, dead_code_reset_after=0)
        untrained = weights_of(vqgan)
        fit(vqgan, 3, batch=4)
        assert any(name.startswith("discriminator") for name in changed(vqgan, untrained)) == (start_step == 0)
        trained.append({k: v for k, v in vqgan.state_dict().items() if not k.startswith("discriminator.")})
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_generator_and_discriminator_get_only_their_own_gradients(fit):
    class RecordGradients(VQGAN):
        def manual_backward(self, loss, *arguments, **named) -> None:
            super().manual_backward(loss, *arguments, **named)
            gradients.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})

    gradients: list[dict[str, torch.Tensor]] = []
    fit(RecordGradients(**gan().hparams), 1, batch=4)
    first, second = gradients
    assert {name.split(".")[0] for name in first} == {"autoencoder"}
    assert {name.split(".")[0] for name in second} == {"autoencoder", "discriminator"}
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


def test_commitment_weight_scales_the_commitment_loss(images):
    """beta ||z - sg[z_q]||^2 (VQ-VAE, Eq. 3): doubling beta doubles the encoder's gradient, not that of the codes."""
    codebook_gradients = {}
    encoder_gradients = {}
    for beta in (0.25, 0.5):
        torch.manual_seed(0)
        vqgan = model(commitment_weight=beta, codebook_weight=3.0, quantizer_type="euclidean").eval()
        reconstruction, quantized = vqgan.autoencode(images)
        terms = vqgan.autoencoder_loss(images, reconstruction, quantized)
        z = vqgan.encode_latents(images).detach()
        codes = vqgan.autoencoder.quantize.indices_to_codes(quantized.indices).detach()
        squared = (z - codes).square().mean()
        torch.testing.assert_close(terms["commitment_loss"].detach(), beta * squared)
        torch.testing.assert_close(terms["codebook_loss"].detach(), 3 * squared)
        (terms["codebook_loss"] + terms["commitment_loss"]).backward()
        codebook_gradients[beta] = vqgan.autoencoder.quantize.embedding.weight.grad
        encoder_gradients[beta] = vqgan.autoencoder.quant_conv.weight.grad
    torch.testing.assert_close(codebook_gradients[0.5], codebook_gradients[0.25])
    torch.testing.assert_close(encoder_gradients[0.5], 2 * encoder_gradients[0.25])


def test_sum_reduction_is_equation_4_as_printed(images):
    """||I - I'||^2 + ||sg[z] - z_q||^2 + ||z - sg[z_q]||^2, summed over each image's elements."""
    sizes = VQGAN_SIZES | dict(quantizer_type="euclidean", dead_code_reset_after=0, reduction="sum")
    vqgan = make_vqgan(**sizes | dict(reconstruction="l2", commitment_weight=1.0, perceptual_weight=0.0)).eval()
    reconstruction, quantized = vqgan.autoencode(images)
    terms = vqgan.autoencoder_loss(images, reconstruction, quantized)
    z = vqgan.encode_latents(images)
    z_q = vqgan.autoencoder.quantize.indices_to_codes(quantized.indices)
    printed = ((images - reconstruction) ** 2).sum((1, 2, 3)).mean()
    assert terms["reconstruction_loss"].item() == pytest.approx(printed.item(), rel=1e-5)
    for name in ("codebook_loss", "commitment_loss"):
        assert terms[name].item() == pytest.approx(((z - z_q) ** 2).sum((1, 2, 3)).mean().item(), rel=1e-5)


def test_adversarial_weight_is_constant_without_the_adaptive_weight(fit, images):
    """The gradient is that of L_VQ + L_GAN (Eq. 7), in which both networks have the minimax loss."""
    arguments = dict(gan_weight=1.0, gan_loss="minimax", gan_adaptive=False, learning_rate=0.0, lecam_weight=0.0)
    vqgan = gan(**arguments, dead_code_reset_after=0)
    by_hand = gan(**arguments, dead_code_reset_after=0).train()
    by_hand.load_state_dict(vqgan.state_dict())
    fit(vqgan, 1, batch=4)
    batch = ShapesDataset(4, seed=3).render(range(4))
    reconstruction, quantized = by_hand.autoencode(batch)
    terms = by_hand.autoencoder_loss(batch, reconstruction, quantized)
    equation_7 = sum(terms.values()) + losses.generator_loss(by_hand.discriminator(reconstruction), "minimax")
    equation_7.backward(inputs=list(by_hand.autoencoder.parameters()))
    for ours, expected in zip(vqgan.autoencoder.parameters(), by_hand.autoencoder.parameters()):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-7, rtol=1e-3)


def grad_norm(loss: torch.Tensor, vqgan: VQGAN) -> torch.Tensor:
    """Return the norm of the gradient at the decoder's last layer."""
    last_layer = vqgan.autoencoder.decoder.last_layer
    return torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_gradients_match_autograd_of_the_full_losses(fit, images, grad_accum_steps):
    """The vector-Jacobian product gives the same gradients as separate passes for Eq. 4 and 5."""
    arguments = dict(gan_weight=0.5, gan_loss="log", learning_rate=0.0, dead_code_reset_after=0, lecam_weight=0.0)
    vqgan = gan(**arguments, grad_accum_steps=grad_accum_steps)
    by_hand = gan(**arguments).train()
    by_hand.load_state_dict(vqgan.state_dict())
    fit(vqgan, 1, batch=4)
    for i in range(grad_accum_steps):
        batch = ShapesDataset(4 * grad_accum_steps, seed=3).render(range(4 * i, 4 * i + 4))
        reconstruction, quantized = by_hand.autoencode(batch)
        terms = by_hand.autoencoder_loss(batch, reconstruction, quantized)
        gan_loss = losses.generator_loss(by_hand.discriminator(reconstruction), "log")
        recon_norm = grad_norm(terms["reconstruction_loss"], by_hand)
        weight = 0.5 * (recon_norm / (grad_norm(gan_loss, by_hand) + 1e-4)).detach()
        loss = sum(terms.values()) + weight * gan_loss
        generator = list(by_hand.autoencoder.parameters())
        discriminator = list(by_hand.discriminator.parameters())
        logits_fake = by_hand.discriminator(reconstruction.detach())
        disc_loss = losses.discriminator_loss(by_hand.discriminator(batch), logits_fake, "log")
        (loss / grad_accum_steps).backward(inputs=generator, retain_graph=True)
        (disc_loss / grad_accum_steps).backward(inputs=discriminator)
    for (name, ours), expected in zip(vqgan.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-7, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_step_runs_encoder_and_decoder_once(fit):
    """And the discriminator twice, for real images and reconstructions."""
    vqgan = gan()
    calls = []
    networks = {
        "encoder": vqgan.autoencoder.encoder,
        "decoder": vqgan.autoencoder.decoder,
        "discriminator": vqgan.discriminator,
    }
    for name, network in networks.items():
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    fit(vqgan, 1, batch=4)
    assert sorted(calls) == ["decoder", "discriminator", "discriminator", "encoder"]


def test_accumulated_batches_count_as_one_step(fit):
    recorded = RecordBatches()
    trainer = fit(gan(grad_accum_steps=3), 2, recorded, batch=2)
    assert trainer.global_step == 2 and recorded.num_batches == 6 and recorded.steps == [0, 0, 0, 1, 1, 1]


class RecordWeights(pl.Callback):
    """Record the autoencoder's weights after each batch."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.weights.append(weights_of(module.autoencoder))


def test_evaluation_and_files_use_the_ema(tmp_path, fit, images):
    """The first step copies the weights; then ema = decay * ema + (1 - decay) * weights."""
    vqgan = model(ema_decay=0.7, dead_code_reset_after=0)
    recorded = RecordWeights()
    trainer = fit(vqgan, 3, recorded, batch=4)
    first, second, third = recorded.weights
    for name, average in vqgan.ema.module.state_dict().items():
        expected = 0.7 * (0.7 * first[name] + 0.3 * second[name]) + 0.3 * third[name]
        torch.testing.assert_close(average, expected if average.is_floating_point() else third[name])
    assert vqgan.train().active_model is vqgan.autoencoder and vqgan.eval().active_model is vqgan.ema.module
    with torch.no_grad():
        reconstruction = vqgan(images)
        assert not torch.equal(reconstruction, vqgan.autoencoder(images)[0])
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        for path in (vqgan.save(tmp_path / "folder"), tmp_path / "last.ckpt"):
            assert torch.equal(VQGAN.load(path)(images), reconstruction)


def gradients(fit, **options) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step. Over several steps of Adam, tiny differences would grow."""
    torch.manual_seed(1)
    vqgan = gan(dead_code_reset_after=0, learning_rate=0.0, **(dict(channels_last=False) | options))
    fit(vqgan, 1, batch=4)
    return {name: p.grad for name, p in vqgan.named_parameters()}


@pytest.mark.parametrize(
    "option", ["grad_checkpointing", "channels_last", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_speed_and_memory_options_keep_gradients(fit, option):
    reference, actual = gradients(fit), gradients(fit, **{option: True})
    assert list(reference) == list(actual)  # compiled modules keep their names
    for name, expected in reference.items():
        torch.testing.assert_close(actual[name], expected, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_compiled_training_writes_ordinary_checkpoints(fit, tmp_path, images):
    vqgan = gan(compile=True)
    fit(vqgan, 2, batch=4).save_checkpoint(tmp_path / "last.ckpt")
    with torch.no_grad():
        again = VQGAN.load(tmp_path / "last.ckpt")(images)
        torch.testing.assert_close(again, vqgan.eval()(images), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("disc_only_steps", [1, 0])
def test_compiled_training_supports_disc_only_steps(fit, disc_only_steps):
    """The discriminator's graph is differentiated once in these steps, and twice later."""
    fit(gan(compile=True, gan_disc_only_steps=disc_only_steps), 3, batch=4)


def test_lecam_changes_only_the_discriminator(fit):
    trained = []
    for weight in (0.0, 10.0):
        torch.manual_seed(1)
        vqgan = gan(lecam_weight=weight, dead_code_reset_after=0, gan_disc_only_steps=100)
        fit(vqgan, 2, batch=4)
        trained.append(weights_of(vqgan))
    same = {name for name in trained[0] if torch.equal(trained[0][name], trained[1][name])}
    assert all(name in same for name in trained[0] if name.startswith("autoencoder."))
    assert "discriminator.main.0.weight" not in same


def test_grad_clip_applies_to_each_network_separately(fit):
    norms = {}
    for clip in (0.0, 1e-3):
        vqgan = gan(grad_clip=clip)
        fit(vqgan, 2, batch=4)
        groups = [optimizer.param_groups[0]["params"] for optimizer in vqgan.optimizers()]
        assert sum(map(len, groups)) == len(list(vqgan.parameters()))
        norms[clip] = [torch.stack([p.grad.norm() for p in group]).norm().item() for group in groups]
    assert min(norms[0.0]) > 2e-3
    assert norms[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_training_lowers_the_error_and_validation_logs_metrics():
    vqgan = model(learning_rate=3e-3)
    images = ShapesDataset(32, seed=5).render(range(32))
    data = DataLoader([{"images": image} for image in images], batch_size=32)
    first = (vqgan(images) - images).square().mean().item()
    pl.Trainer(max_steps=40, accelerator="cpu", **QUIET).fit(vqgan, data)
    vqgan.eval()
    trainer = pl.Trainer(accelerator="cpu", **QUIET)
    trainer.validate(vqgan, DataLoader([{"images": -image} for image in images]), verbose=False)
    trainer.validate(vqgan, data, verbose=False)  # resets the counts of codes
    with torch.no_grad():
        error = (vqgan(images).clamp(-1, 1) - images).square().mean((1, 2, 3))
        indices = vqgan.encode(images)
    assert error.mean() < first / 2
    # The logged metrics, by hand.
    metrics = trainer.callback_metrics
    assert metrics["val/codebook_usage"].item() == pytest.approx(len(indices.unique()) / 16)
    assert metrics["val/psnr"].item() == pytest.approx((10 * (4 / error).log10()).mean().item(), abs=1e-3)
    p = torch.bincount(indices.flatten()) / indices.numel()
    p = p[p > 0]
    assert metrics["val/perplexity"].item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("size", "num_latents"), [(40, 160), (4, 128)])
def test_kmeans_gets_ten_latents_per_code_if_available(monkeypatch, stream, size, num_latents):
    """A batch of four images has only 64 latents, so more images are encoded, as far as there are any."""
    counts = []
    monkeypatch.setattr(VectorQuantizer, "kmeans_init_", lambda self, latents: counts.append(len(latents)))
    vqgan = model(kmeans_iters=2, codebook_size=16)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", **QUIET)
    items = [ShapesDataset(size, seed=3)[i] for i in range(size)]
    dataset = Stream(items) if stream else items
    trainer.fit(vqgan, DataLoader(dataset, batch_size=4))
    assert counts == [num_latents]


class Stream(IterableDataset):
    """An iterable dataset of the given items."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_bf16_training_keeps_fp32_weights_and_code_losses(fit):
    vqgan = gan(ema_decay=0.9, lecam_weight=0.1)
    metrics = fit(vqgan, 2, batch=2, precision="bf16-mixed").callback_metrics
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(p.dtype == torch.float32 for p in vqgan.parameters())
    for name in ("train/codebook_loss", "train/commitment_loss"):
        assert metrics[name].dtype == torch.float32


def test_fp16_is_refused(monkeypatch):
    vqgan = gan()
    vqgan._trainer = type("Trainer", (), {"precision": "16-mixed"})()
    with pytest.raises(ValueError, match=r"trainer\.precision must be 32-true or bf16-mixed, got 16-mixed"):
        vqgan.on_fit_start()


UNUSED = "ddp_find_unused_parameters_true"


class SeedBatches(pl.Callback):
    """Give each batch its own random numbers."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        torch.manual_seed(batch_idx)


class CountExchanges(SeedBatches):
    """Record at which batches DDP exchanges gradients."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.batch = 0

    def on_train_start(self, trainer, module) -> None:
        trainer.strategy.model.register_comm_hook(None, self.exchange)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        self.batch = batch_idx

    # DDP refuses annotations that are strings.
    def exchange(self, state, bucket):
        self.batches.append(self.batch)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def test_processes_exchange_gradients_only_once_per_optimizer_step(fit, monkeypatch):
    """While gradients accumulate nothing is sent, and the result is bit-identical to a training without DDP."""
    # Lightning sets the number of threads of a training with DDP, unless this is set; it decides the order of sums.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    alone = gan(grad_accum_steps=3)
    with_ddp = copy.deepcopy(alone)
    fit(alone, 2, SeedBatches(), batch=2)
    count = CountExchanges()
    try:
        fit(with_ddp, 2, count, batch=2, strategy=UNUSED, use_distributed_sampler=False)
    finally:
        torch.distributed.destroy_process_group()
    assert set(count.batches) == {2, 5}
    assert not changed(with_ddp, alone.state_dict())


class EqualOnAllRanks(pl.Callback):
    """Check that all ranks, which trained on different images, have bit-identical weights."""

    def on_train_end(self, trainer, module) -> None:
        norm = next(m for m in module.discriminator.modules() if isinstance(m, torch.nn.BatchNorm2d))
        of_ranks = module.all_gather(norm.running_mean)
        average_statistics(module.discriminator)  # as before a checkpoint
        assert not torch.equal(of_ranks[0], of_ranks[1])
        torch.testing.assert_close(norm.running_mean, of_ranks.mean(dim=0))
        for name, tensor in module.state_dict().items():
            first, second = module.all_gather(tensor.float())
            assert torch.equal(first, second), name
        assert trainer.world_size == 2 and trainer.global_step == 4


@pytest.mark.slow
def test_two_processes_train_identical_models(fit):
    """Also if gradients are accumulated before they are exchanged."""
    vqgan = gan(
        grad_accum_steps=2,
        gan_start_step=1,
        gan_disc_only_steps=1,
        dead_code_reset_after=2,
        codebook_ema_decay=0.9,
        kmeans_iters=3,
        ema_decay=0.9,
        lecam_weight=0.1,
    )
    before = weights_of(vqgan)
    fit(vqgan, 8, EqualOnAllRanks(), batch=4, devices=2, strategy="ddp_spawn_find_unused_parameters_true", max_epochs=1)
    assert {name.split(".")[0] for name in changed(vqgan, before)} >= {"autoencoder", "ema", "discriminator"}


# ---------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def test_save_and_load_are_bit_identical(tmp_path, tiny_vqgan, images):
    again = VQGAN.load(tiny_vqgan.save(tmp_path / "vqgan"))
    assert not again.training and dict(again.hparams) == json.loads(json.dumps(tiny_vqgan.hparams))
    assert not changed(again, weights_of(tiny_vqgan))
    assert torch.equal(again(images), tiny_vqgan(images))


def test_saved_folder_has_no_discriminator(tmp_path, images):
    vqgan = gan().eval()
    again = VQGAN.load(vqgan.save(tmp_path / "vqgan"))
    assert again.discriminator is None
    assert torch.equal(again.encode(images), vqgan.encode(images))


@torch.no_grad()
def test_half_precision_folder_is_smaller_and_loads_as_fp32(tmp_path, tiny_vqgan, images):
    full = tiny_vqgan.save(tmp_path / "full")
    half = tiny_vqgan.save(tmp_path / "half", half=True)
    full_size = (full / "model.safetensors").stat().st_size
    half_size = (half / "model.safetensors").stat().st_size
    assert half_size < 0.6 * full_size
    again = VQGAN.load(half)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(again(images), tiny_vqgan(images), atol=0.1, rtol=0.1)


def test_training_checkpoint_loads(tmp_path, fit, images):
    vqgan = gan()
    fit(vqgan, 2, batch=4).save_checkpoint(tmp_path / "last.ckpt")
    again = VQGAN.load(tmp_path / "last.ckpt")
    assert again.hparams == vqgan.hparams and not changed(again, weights_of(vqgan))
    assert torch.equal(again(images), vqgan.eval()(images))


def test_a_validation_keeps_the_gradients_of_an_incomplete_step(tmp_path):
    """Lightning would reset them before a validation that falls between the batches of a step."""
    states = []
    for interval in (None, 1):
        pl.seed_everything(0)
        vqgan = model(grad_accum_steps=2)
        batches = DataLoader(ShapesDataset(16, seed=3), batch_size=4)
        limits = dict(max_steps=2, limit_val_batches=0 if interval is None else 1, val_check_interval=interval)
        trainer = pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path, **QUIET, **limits)
        trainer.fit(vqgan, batches, batches)
        states.append({name: value for name, value in vqgan.state_dict().items() if "batches_since_use" not in name})
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
