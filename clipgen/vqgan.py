"""Stage 1: VQ-GAN, which encodes an image as a grid of code indices and decodes it back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from clipgen.checkpoint import hfailab, model_folder, taming
from clipgen.checkpoint.pretrained import PretrainedModule
from clipgen.checkpoint.safe_load import add_prefix, strip_prefix
from clipgen.checkpoint.verified_build import build_verified, named_load_errors
from clipgen.checkpoint.vgg import load_lpips
from clipgen.clip import FrozenCLIP
from clipgen.data.datamodule import training_images
from clipgen.data.samplers import num_real_samples
from clipgen.hardware.device import check_compile, should_compile
from clipgen.images import check_images, images_from_batch, psnr, rounded
from clipgen.models import losses
from clipgen.models.autoencoder import Autoencoder
from clipgen.models.config import (
    AutoencoderConfig,
    GANConfig,
    LossConfig,
    OptimizerConfig,
    QuantizerConfig,
    as_config,
    to_plain,
)
from clipgen.models.discriminator import PatchDiscriminator, average_statistics
from clipgen.models.lpips import lpips_from_state
from clipgen.models.quantizers.base import QuantizerOutput, code_counts, usage_and_perplexity
from clipgen.nonfinite import StepGuard, StopOnNonFinite, check_losses, check_weights
from clipgen.optim import EMA, has_fused_kernels, make_lr_scheduler, parameters_of, total_optimizer_steps

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

# Order of the optimizers.
GENERATOR = 0
DISCRIMINATOR = 1
# Losses of the quantizer that Eq. 4 prints as sums over the elements of the codes.
SUMMED_LOSSES = {"codebook_loss", "commitment_loss"}
# Prefixes of the networks that a model folder may contain besides the tokenizer.
OPTIONAL_PARTS = ("discriminator.", "lpips.")


class VQGAN(PretrainedModule, pl.LightningModule):
    """VQ-GAN (arXiv:2012.09841), stage 1 of CLIP-GEN.

    The loss is reconstruction + codebook + commitment (Eq. 4) + perceptual + adversarial (Eq. 5) loss. The adversarial
    loss is weighted by ``gan.weight`` times VQ-GAN's adaptive weight (its Eq. 7), or by ``gan.weight`` alone if
    ``gan.adaptive`` is False; CLIP-GEN prints weight 1 (its Eq. 7). Images are (B, 3, H, W) in [-1, 1], with sides
    divisible by f = ``downsampling``. Training batches are ``{"images": images}``.

    Args:
        autoencoder: sizes of encoder and decoder, see ``AutoencoderConfig``.
        quantizer: type and size of the codebook, see ``QuantizerConfig``.
        loss: weights of the losses, see ``LossConfig``.
        gan: discriminator and adversarial loss, see ``GANConfig``.
        optimizer: Adam's settings for generator and discriminator, see ``OptimizerConfig``. The discriminator's
            warm-up begins at ``gan.start_step``; gradients of both are clipped separately.
        compile: use torch.compile in training; "auto" on a GPU only.
        channels_last: NHWC memory format of images and weights.

    The first five may be dataclasses or mappings of their fields; None uses the defaults, which are the published ones.
    """

    counts: Tensor
    discriminator: Any  # PatchDiscriminator, or None

    def __init__(
        self,
        autoencoder: AutoencoderConfig | Mapping[str, Any] | None = None,
        quantizer: QuantizerConfig | Mapping[str, Any] | None = None,
        loss: LossConfig | Mapping[str, Any] | None = None,
        gan: GANConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
        compile: bool | str = False,
        channels_last: bool = False,
    ):
        super().__init__()
        self.autoencoder_config = as_config(AutoencoderConfig, autoencoder)
        self.quantizer_config = as_config(QuantizerConfig, quantizer)
        self.loss_config = as_config(LossConfig, loss)
        self.had_clip_perceptual_loss = False  # set by `from_state`, which leaves the CLIP perceptual loss out
        self.gan_config = as_config(GANConfig, gan)
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.save_hyperparameters(self._arguments(compile, channels_last))
        # Generator and discriminator have an optimizer each, which Lightning does not step automatically.
        self.automatic_optimization = False
        self.downsampling = self.autoencoder_config.downsampling
        self.codebook_size = self.quantizer_config.codebook_size
        self.autoencoder = Autoencoder(self.autoencoder_config, self.quantizer_config)
        ema_decay = self.optimizer_config.ema_decay
        self.ema = EMA(self.autoencoder, ema_decay) if ema_decay > 0 else None
        self._build_discriminator()
        self.register_buffer("counts", torch.zeros(self.codebook_size, dtype=torch.int64), persistent=False)
        # A broadcast by DDP would overwrite the counts of other ranks, and make ranks without a validation batch wait.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.guard = StepGuard(self.optimizer_config.max_skipped_steps)
        self.averages = losses.Averages()
        # In tuples, so that the frozen networks are not part of parameters, mode or checkpoints.
        self._lpips: tuple[nn.Module, ...] = ()
        self._clip: tuple[FrozenCLIP, ...] = ()

    def _arguments(self, compile: bool | str, channels_last: bool) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, which checkpoints and model folders store."""
        return {
            "autoencoder": to_plain(self.autoencoder_config),
            "quantizer": to_plain(self.quantizer_config),
            "loss": to_plain(self.loss_config),
            "gan": to_plain(self.gan_config),
            "optimizer": to_plain(self.optimizer_config),
            "compile": check_compile(compile),
            "channels_last": channels_last,
        }

    def _build_discriminator(self) -> None:
        gan = self.gan_config
        self.discriminator = PatchDiscriminator(gan.channels, gan.num_layers) if gan.weight > 0 else None
        self.lecam = losses.LeCam() if gan.weight > 0 and gan.lecam_weight > 0 else None

    # ------------------------------------------------------------------------------------------- images <-> indices

    @property
    def active_model(self) -> Autoencoder:
        """The autoencoder in use: in evaluation mode the EMA weights (if any), else the trained weights."""
        return self.autoencoder if self.training else self._export_model

    @property
    def _export_model(self) -> Autoencoder:
        net: Any = self.ema.module if self.ema is not None and self.ema.initialized else self.autoencoder
        return net

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self.active_model.quantize.codebook

    def encode_latents(self, images: Tensor) -> Tensor:
        """Encode images as latents before quantization: (B, 3, H, W) in [-1, 1] -> (B, D, h, w).

        Raises:
            ValueError: the images have another shape or dtype, or sides that are not divisible by f.
        """
        self._check_size(images)
        return self.active_model.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] as code indices (B, h, w) int64, in row-major order the paper's s.

        Call it in evaluation mode; in training mode it also updates the codebook (EMA and dead-code resets).

        Raises:
            ValueError: the images have another shape or dtype, or sides that are not divisible by f.
        """
        return self.active_model.quantize(self.encode_latents(images)).indices

    def decode(self, indices: Tensor) -> Tensor:
        """Decode code indices (B, h, w) int64 to images (B, 3, h * f, w * f), which are not clamped.

        Raises:
            ValueError: the indices have another shape.
        """
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), got {tuple(indices.shape)}")
        return self.decode_latents(self.active_model.quantize.indices_to_codes(indices))

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """Decode codes (B, D, h, w) to images (B, 3, h * f, w * f)."""
        return self.active_model.decode(z_q)

    def autoencode(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Return the reconstruction of images, both (B, 3, H, W), and the quantizer's output.

        Args:
            images: (B, 3, H, W) in [-1, 1], with sides divisible by f.

        Raises:
            ValueError: the images have another shape or dtype.
        """
        self._check_size(images)
        return self.active_model(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstruction of images in [-1, 1], both (B, 3, H, W), see ``autoencode``."""
        return self.autoencode(images)[0]

    def _check_size(self, images: Tensor) -> None:
        check_images(images)
        height, width = images.shape[-2:]
        f = self.downsampling
        if height % f or width % f:
            raise ValueError(
                f"images must be (B, 3, H, W) with sides divisible by {f}, got {tuple(images.shape)}; "
                f"try a height of {nearest_multiples(height, f)} and a width of {nearest_multiples(width, f)}"
            )

    # ----------------------------------------------------------------------------------------------------- training

    def configure_optimizers(self) -> Any:
        """Return Adam and its learning-rate schedule for the generator and, if there is one, the discriminator."""
        config = self.optimizer_config
        networks = [self.autoencoder] + ([self.discriminator] if self.discriminator else [])
        betas = (config.betas[0], config.betas[1])
        fused = has_fused_kernels(self.parameters())
        adam = partial(torch.optim.Adam, lr=config.learning_rate, betas=betas, fused=fused)
        total_steps = total_optimizer_steps(self.trainer, config.grad_accum_steps)
        start_steps = (0, self.gan_config.start_step)
        optimizers = []
        schedulers = []
        for network, start_step in zip(networks, start_steps):
            optimizer = adam([p for p in network.parameters() if p.requires_grad])
            scheduler = make_lr_scheduler(optimizer, config.schedule, config.warmup_steps, total_steps, start_step)
            optimizers.append(optimizer)
            schedulers.append(scheduler)
        return optimizers, schedulers

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that stops training after too many skipped steps."""
        return [StopOnNonFinite(self.guard)]

    def on_fit_start(self) -> None:
        precision = self.trainer.precision
        if precision not in ("32-true", "bf16-mixed"):
            reason = ": GAN losses overflow in fp16" if precision == "16-mixed" else ""
            raise ValueError(f"trainer.precision must be 32-true or bf16-mixed, got {precision}{reason}")
        if self.gan_config.weight > 0 and self.discriminator is None:
            logger.warning("The checkpoint has no discriminator; training continues without the adversarial loss.")
        if self.had_clip_perceptual_loss:
            logger.warning("The tokenizer was trained with a CLIP perceptual loss; training continues without it.")
        if self.loss_config.perceptual_weight > 0:
            self.lpips()  # load it now rather than in the first step
        if self.loss_config.clip_perceptual_weight > 0:
            self.perceptual_clip()
        # A loaded model is in evaluation mode, and Lightning does not change that.
        self.train()
        self.apply_speed_options_()

    def lpips(self) -> nn.Module:
        """Return the perceptual loss on this module's device; load it on the first call."""
        if not self._lpips:
            self._lpips = (load_lpips(self.loss_config.vgg_weights),)
        return self._lpips[0].to(self.device)

    def perceptual_clip(self) -> FrozenCLIP:
        """Return the CLIP of the perceptual loss on this module's device; load it on the first call."""
        if not self._clip:
            self._clip = (FrozenCLIP.from_spec(str(self.loss_config.clip_perceptual_model)),)
        return self._clip[0].to(self.device)

    def apply_speed_options_(self) -> None:
        """Apply ``channels_last`` and ``compile``.

        Neither renames parameters; results change only by floating-point rounding.
        """
        if self.hparams["channels_last"]:
            self.to(memory_format=torch.channels_last)
        if should_compile(self.hparams["compile"], self.device):
            self._compile()

    def _compile(self) -> None:
        """Compile the networks in place, which keeps the names of their parameters."""
        # The graph is differentiated twice: for the adaptive weight and for the step.
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
        # The decoder's last layer is not compiled, because the adaptive weight needs its gradient alone.
        autoencoder: Any = self.autoencoder
        autoencoder.encoder.compile()
        autoencoder.decoder.forward_features = torch.compile(autoencoder.decoder.forward_features)
        for network in (self.discriminator, *self._lpips):
            if network is not None:
                network.compile()

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of an incomplete step, which Lightning would reset before a validation."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accumulate the gradients of generator and discriminator; step their optimizers if the step is complete."""
        images = images_from_batch(batch)
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        self._initialize_codebook(images, batch_idx)
        grad_accum_steps = self.optimizer_config.grad_accum_steps
        if batch_idx % grad_accum_steps == 0:
            self.zero_grad()
            self.guard.protect(self._changed_by_forward())
        is_optimizer_step = (batch_idx + 1) % grad_accum_steps == 0 or self.trainer.is_last_batch

        # Generator and discriminator share one forward pass. All image-space losses are computed on a detached copy
        # of the reconstruction. Their gradient w.r.t. that copy is then back-propagated through the autoencoder as a
        # vector-Jacobian product, so neither loss reaches the other network.
        reconstruction, quantized = self.autoencode(images)
        detached = reconstruction.detach().float().requires_grad_()
        logits_fake = self.discriminator(detached) if self._disc_active() else None

        loss_terms = self.autoencoder_loss(images, detached, quantized)
        recon_grad = image_loss_gradient(loss_terms, detached, quantized)
        quantizer_loss = sum(loss_terms[name] for name in quantized.losses)
        if logits_fake is not None and self._adversarial_loss_active():
            adv_grad, adv_terms = self._adversarial_gradient(logits_fake, detached, reconstruction, recon_grad)
            recon_grad = recon_grad + adv_grad
            loss_terms |= adv_terms

        vjp = (reconstruction * recon_grad).sum()  # its gradient w.r.t. the weights is J^T recon_grad
        with self._gradient_exchange(is_optimizer_step):
            self.manual_backward((vjp + quantizer_loss) / grad_accum_steps)
            if logits_fake is not None:
                self.manual_backward(self._discriminator_loss(images, logits_fake) / grad_accum_steps)
        self.guard.record(loss_terms)
        if is_optimizer_step:
            self._step_optimizers(num_optimizers=1 if logits_fake is None else 2)
        self._log_losses(loss_terms, quantized)

    def _gradient_exchange(self, enabled: bool) -> AbstractContextManager[None]:
        """Return a context in which processes average their gradients, or only accumulate them."""
        strategy = self.trainer.strategy
        if enabled or not isinstance(strategy, DDPStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def _initialize_codebook(self, images: Tensor, batch_idx: int) -> None:
        """Initialize the codes by k-means before the first step of training, if ``kmeans_iters`` is above 0."""
        if self.quantizer_config.kmeans_iters and self.global_step == batch_idx == 0:
            self._kmeans_init(images)

    @torch.no_grad()
    def _kmeans_init(self, images: Tensor) -> None:
        """Initialize the codes by k-means on the latents of the first batch, and of more images if it is too small."""
        quantizer = self.autoencoder.quantize
        latents = [quantizer.as_vectors(self.encode_latents(images))]
        num_wanted = math.ceil(quantizer.kmeans_latents / self.trainer.world_size)
        latents_per_image = len(latents[0]) / len(images)
        num_images = math.ceil((num_wanted - len(latents[0])) / latents_per_image)
        for batch in training_images(self.trainer, num_images, len(images)):
            latents.append(quantizer.as_vectors(self.encode_latents(batch.to(images))))
        quantizer.kmeans_init_(torch.cat(latents)[:num_wanted])

    def _changed_by_forward(self) -> list[Tensor]:
        """Return the tensors that training changes without an optimizer: codes, and statistics of batches."""
        tensors: list[Tensor] = [*self.autoencoder.quantize.parameters(), *self.autoencoder.buffers()]
        for network in (self.discriminator, self.lecam):
            if network is not None:
                tensors += network.buffers()
        return tensors

    def _disc_active(self) -> bool:
        """Return whether the discriminator is trained at this step."""
        return self.discriminator is not None and self.global_step >= self.gan_config.start_step

    def _adversarial_loss_active(self) -> bool:
        """Return whether the adversarial loss is applied to the generator at this step."""
        return self.global_step >= self.gan_config.start_step + self.gan_config.disc_only_steps

    def autoencoder_loss(self, images: Tensor, reconstruction: Tensor, quantized: QuantizerOutput) -> dict[str, Tensor]:
        """Return the weighted loss terms that need no discriminator; their sum is the loss (Eq. 4 and LPIPS).

        Args:
            images: (B, 3, H, W) in [-1, 1].
            reconstruction: reconstruction of the images, the same shape.
            quantized: output of the quantizer for these images.

        Returns:
            Scalars by the names under which they are logged.
        """
        config = self.loss_config
        terms = {"reconstruction_loss": losses.reconstruction_loss(images, reconstruction, config.reconstruction)}
        if config.perceptual_weight > 0:
            terms["perceptual_loss"] = config.perceptual_weight * self.lpips()(images, reconstruction).mean()
        if config.clip_perceptual_weight > 0:
            distance = self.perceptual_clip().perceptual_distance(images, reconstruction).mean()
            terms["clip_perceptual_loss"] = config.clip_perceptual_weight * distance
        for name, value in quantized.losses.items():
            terms[name] = config.weight_of(name) * value
        if config.reduction == "sum":
            terms["reconstruction_loss"] = terms["reconstruction_loss"] * images[0].numel()
            for name in SUMMED_LOSSES & set(terms):
                terms[name] = terms[name] * quantized.z_q[0].numel()
        return terms

    def _adversarial_gradient(
        self,
        logits_fake: Tensor,
        detached: Tensor,
        reconstruction: Tensor,
        recon_grad: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted gradient of the generator loss w.r.t. the reconstruction, and the terms to log."""
        gan = self.gan_config
        generator_loss = losses.generator_loss(logits_fake, gan.loss)
        adv_grad = torch.autograd.grad(generator_loss, detached, retain_graph=True)[0]
        weight = torch.tensor(gan.weight, device=detached.device)
        if gan.adaptive:
            last_layer = self.autoencoder.decoder.last_layer
            maximum = gan.adaptive_weight_max
            weight = weight * losses.adaptive_weight(reconstruction, last_layer, recon_grad, adv_grad, maximum)
        return weight * adv_grad, {"generator_loss": generator_loss, "adaptive_weight": weight}

    def _discriminator_loss(self, images: Tensor, logits_fake: Tensor) -> Tensor:
        """Return the discriminator's loss, and log it."""
        logits_real = self.discriminator(images)
        loss = losses.discriminator_loss(logits_real, logits_fake, self.gan_config.loss)
        logged = {"discriminator_loss": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        self.log_dict(add_prefix("train/", detach_all(logged)))
        self.guard.record({"discriminator_loss": loss})
        if self.lecam is not None:
            lecam_loss = self.gan_config.lecam_weight * self.lecam(logits_real, logits_fake)
            self.guard.record({"lecam_loss": lecam_loss})
            self.log("train/lecam_loss", lecam_loss.detach())
            loss = loss + lecam_loss
        return loss

    def _step_optimizers(self, num_optimizers: int) -> None:
        """Step the generator's and, if ``num_optimizers`` is 2, the discriminator's optimizer.

        Both steps are skipped if a loss or gradient of either network is not finite.
        """
        config = self.optimizer_config
        # Lightning's wrapper of the discriminator's optimizer would count a second global step for the same batch.
        raw = as_list(self.optimizers(use_pl_optimizer=False))[:num_optimizers]
        steppers = [as_list(self.optimizers())[GENERATOR], *raw[DISCRIMINATOR:]]
        self.guard.before_step(raw, self.global_step + 1)
        for optimizer, stepper in zip(raw, steppers):
            if config.grad_clip > 0:
                nn.utils.clip_grad_norm_(parameters_of(optimizer), config.grad_clip)
            stepper.step()
        # A subclass may have no schedulers.
        for scheduler in as_list(self.lr_schedulers())[:num_optimizers]:
            scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.autoencoder)

    def _log_losses(self, loss_terms: dict[str, Tensor], quantized: QuantizerOutput) -> None:
        terms = detach_all(loss_terms)
        self.log_dict(add_prefix("train/", terms))
        adversarial_loss = terms.pop("adaptive_weight", 0.0) * terms.pop("generator_loss", 0.0)
        self.log("train/loss", torch.stack(list(terms.values())).sum() + adversarial_loss)
        self.log("train/perplexity", usage_and_perplexity(code_counts(quantized.indices, self.codebook_size))[1])

    # --------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.counts.zero_()
        self.averages.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        """Accumulate losses and the PSNR of the 8-bit reconstruction; return that reconstruction.

        Images that another rank also validates are left out; None is returned if no image remains.
        """
        images = images_from_batch(batch)
        images = images[: num_real_samples(self._trainer, batch_idx, len(images))]
        if not len(images):
            return None
        reconstruction, quantized = self.autoencode(images)
        self.counts += code_counts(quantized.indices, self.codebook_size)
        terms = self.autoencoder_loss(images, reconstruction, quantized)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        reconstruction = rounded(reconstruction)
        terms["psnr"] = psnr(images, reconstruction).mean()
        self.averages.add(add_prefix("val/", terms), len(images))
        return reconstruction

    def on_validation_epoch_end(self) -> None:
        means = self.averages.compute()
        check_losses(means, self.global_step)
        self.log_dict(means)
        counts: Any = self.all_gather(self.counts)  # (K,), or (ranks, K)
        self.counts = counts.view(-1, self.codebook_size).sum(0)
        usage, perplexity = usage_and_perplexity(self.counts)
        dead = (self.counts == 0).sum().float()
        self.log_dict({"val/codebook_usage": usage, "val/perplexity": perplexity, "val/dead_codes": dead})

    # -------------------------------------------------------------------------------------------------------- files

    @property
    def last_is_best(self) -> bool:
        """Whether the last checkpoint is exported rather than the one with the lowest validation loss.

        That loss has no adversarial term, so once the discriminator is trained its minimum is misleading.
        """
        return self.discriminator is not None and self.global_step > self.gan_config.start_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.discriminator is not None:
            average_statistics(self.discriminator)
        check_weights(self, self.global_step)
        checkpoint["clipgen_model"] = model_folder.model_name_of(type(self))

    def save(self, path: str | Path, half: bool = False, training: bool = False) -> Path:
        """Write a model folder and return its path.

        Args:
            path: folder to write.
            half: store the weights in half precision.
            training: also store the discriminator and LPIPS, if there are any, besides the tokenizer.
        """
        check_weights(self._export_model)
        state = self._export_model.state_dict()
        if training:
            for prefix, network in zip(OPTIONAL_PARTS, (self.discriminator, *self._lpips)):
                if network is not None:
                    state |= add_prefix(prefix, network.state_dict())
        return model_folder.save_folder(path, model_folder.model_name_of(type(self)), dict(self.hparams), state, half)

    @classmethod
    def from_state(cls, arguments: dict[str, Any], state: dict[str, Tensor]) -> Self:
        """Build the model, in evaluation mode, from its constructor's arguments and the weights of a file.

        ``build_verified`` checks both first. A discriminator that the file does not contain is not built.
        ``loss.vgg_weights`` is not taken from the file, and the CLIP perceptual loss is off: to train the model further
        with either, build a VQGAN with that setting and call ``init_from``.
        """
        gan = as_config(GANConfig, arguments.get("gan"))
        has_discriminator = bool(strip_prefix("discriminator.", state))
        built = arguments | {"gan": to_plain(gan if has_discriminator else replace(gan, weight=0.0))}
        model = cls(**without_foreign_files(without_kmeans(built)))
        model.gan_config = gan
        loss = as_config(LossConfig, arguments.get("loss"))
        model.had_clip_perceptual_loss = loss.clip_perceptual_weight > 0
        # A copy of the model still says how it was trained.
        model.hparams["gan"] = to_plain(gan)
        model.hparams["loss"] = to_plain(without_paths(loss))
        if any(name.startswith("autoencoder.") for name in state):  # a checkpoint
            model.load_state_dict(state)
            return model.eval()
        return model.load_weights_(state)

    @classmethod
    def from_taming(cls, checkpoint: str | Path, config: str | Path | Mapping[str, Any]) -> VQGAN:
        """Load a published VQModel or GumbelVQ of taming-transformers, in evaluation mode.

        Args:
            checkpoint: path of its ``.ckpt``. No code in it is executed.
            config: path of its ``.yaml``, or the parsed mapping.

        Raises:
            ValueError: the file is not such a checkpoint, or its pickle refers to code.
        """
        arguments, state = taming.convert_vqgan(checkpoint, config)
        return build_verified(cls, arguments, state, checkpoint)

    @classmethod
    def from_hfailab(cls, checkpoint: str | Path) -> VQGAN:
        """Load ``vqgan_*.pt`` of HFAiLab/clip-gen, in evaluation mode. No code in it is executed."""
        with named_load_errors(checkpoint, cls.__name__):
            arguments, state = hfailab.convert_vqgan(checkpoint)
        return build_verified(cls, arguments, state, checkpoint)

    def load_weights_(self, state: dict[str, Tensor]) -> Self:
        """Load the weights of a model folder and switch to evaluation mode.

        The discriminator is removed if the folder has none.
        """
        self.load_tokenizer_(state)
        discriminator = strip_prefix("discriminator.", state)
        lpips = strip_prefix("lpips.", state)
        if not discriminator:
            self.discriminator = self.lecam = None
        elif self.discriminator is not None:
            self.discriminator.load_state_dict(discriminator)
        # Some published checkpoints contain only the linear layers of LPIPS, without VGG-16.
        if any(name.startswith("net.") for name in lpips):
            self._lpips = (lpips_from_state(lpips),)
        return self.eval()

    def init_from(self, other: VQGAN) -> VQGAN:
        """Copy the weights of another VQ-GAN: those of the tokenizer and, if it has them, discriminator and LPIPS."""
        self.load_tokenizer_(other.eval().active_model.state_dict())
        if self.discriminator is not None and other.discriminator is not None:
            self.discriminator.load_state_dict(other.discriminator.state_dict())
        return self.share_lpips(other)

    def share_lpips(self, other: VQGAN) -> VQGAN:
        """Use the LPIPS of another VQ-GAN, if it has one."""
        self._lpips = other._lpips
        return self

    def load_tokenizer_(self, state: dict[str, Tensor]) -> None:
        """Load the weights of encoder, quantizer and decoder, also into the EMA.

        Raises:
            RuntimeError: a weight is missing, unknown, or of another shape.
        """
        state = {name: tensor for name, tensor in state.items() if not name.startswith(OPTIONAL_PARTS)}
        networks: list[Any] = [self.autoencoder] if self.ema is None else [self.autoencoder, self.ema.module]
        for network in networks:
            keys = network.load_state_dict(state, strict=False)
            differing = {*keys.missing_keys, *keys.unexpected_keys} - {"quantize.batches_since_use"}
            if differing:
                raise RuntimeError(f"weights do not fit: {', '.join(sorted(differing))}")


def image_loss_gradient(loss_terms: Mapping[str, Tensor], detached: Tensor, quantized: QuantizerOutput) -> Tensor:
    """Return the gradient of the losses in image space w.r.t. the detached reconstruction, (B, 3, H, W)."""
    image_loss = sum(value for name, value in loss_terms.items() if name not in quantized.losses)
    return torch.autograd.grad(image_loss, detached)[0]  # type: ignore[arg-type]


def nearest_multiples(side: int, factor: int) -> str:
    """Return the multiples of ``factor`` next to ``side``, as in "32 or 48"."""
    below_side = max(side // factor, 1) * factor
    above_side = math.ceil(side / factor) * factor
    return " or ".join(str(multiple) for multiple in sorted({below_side, above_side}))


def without_kmeans(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return constructor arguments whose trained codes are not initialized again when training continues."""
    return arguments | {"quantizer": {**(arguments.get("quantizer") or {}), "kmeans_iters": 0}}


def without_paths(loss: LossConfig) -> LossConfig:
    """Return the losses with the name of their CLIP, but without paths, which are local to a machine."""
    clip = loss.clip_perceptual_model and Path(loss.clip_perceptual_model).name
    return replace(loss, vgg_weights=None, clip_perceptual_model=clip)


def without_foreign_files(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return constructor arguments without the files and models for training that the maker of a folder has named."""
    loss = replace(
        as_config(LossConfig, arguments.get("loss")),
        vgg_weights=None,
        clip_perceptual_weight=0.0,
        clip_perceptual_model=None,
    )
    return arguments | {"loss": to_plain(loss)}


def as_list(one_or_more: Any) -> list[Any]:
    """Return a list of what Lightning returns as None, a single object or a list."""
    if one_or_more is None:
        return []
    return list(one_or_more) if isinstance(one_or_more, list) else [one_or_more]


def detach_all(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values by name, without their graphs."""
    return {name: value.detach() for name, value in values.items()}
