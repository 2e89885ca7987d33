"""Stage 1: VQ-GAN, which turns an image into a short row of codebook indices and back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from clipgen import losses
from clipgen.nets.autoencoder import Decoder, Encoder
from clipgen.nets.discriminator import PatchDiscriminator
from clipgen.nets.quantizer import Quantized, VectorQuantizer, usage_and_perplexity
from clipgen.optim import schedule
from clipgen.weights import checkpoint as files

logger = logging.getLogger(__name__)


class VQGAN(pl.LightningModule):
    """VQ-GAN (arXiv:2012.09841), stage 1 of CLIP-GEN: reconstruction + codebook + commitment (Eq. 4) + perceptual +
    adversarial (Eq. 5) loss, with the adaptive weight.

    Images are (B, 3, H, W) in [-1, 1]; height and width are divisible by f = ``patch_size * 2 ** (len(ch_mult) - 1)``.

    Args:
        codebook_size, codebook_dim, distance, revive_after, codebook_momentum: see ``VectorQuantizer``.
        ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels, patch_size, mid_attention,
            local_encoder, dropout: see ``Encoder``.
        reconstruction: ``"l1"`` or ``"l2"``.
        codebook_weight, commitment_weight: of the two terms of Eq. 4; beta of VQ-VAE is the second.
        perceptual_weight: of LPIPS; 0 needs no VGG weights. vgg_weights: their file, else torchvision's cache.
        discriminator_weight: 0 trains no discriminator. discriminator_start: the step at which it wakes up (25 000 in
            the paper; before it neither half of the GAN trains). discriminator_warmup: steps that it then trains alone
            before its gradient reaches the generator. ndf: its width. n_layers: its strided layers.
        adversarial: ``"hinge"`` or ``"log"`` (Eq. 5).
        learning_rate, betas: Adam's, both halves. schedule, warmup_steps: see ``optim.schedule``.
        gradient_clip: largest gradient norm of either half; 0 does not clip.
    """

    counts: Tensor
    discriminator: Any  # PatchDiscriminator, or None

    def __init__(
        self, *, codebook_size: int = 16384, codebook_dim: int = 256, distance: str = "euclidean",
        revive_after: int = 0, codebook_momentum: float = 0.0, ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2, attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256, z_channels: int = 256, patch_size: int = 1, mid_attention: bool = True,
        local_encoder: bool = False, dropout: float = 0.0, reconstruction: str = "l1", codebook_weight: float = 1.0,
        commitment_weight: float = 0.25, perceptual_weight: float = 1.0, vgg_weights: str | None = None,
        discriminator_weight: float = 0.8, discriminator_start: int = 25_000, discriminator_warmup: int = 0,
        ndf: int = 64, n_layers: int = 3, adversarial: str = "hinge", learning_rate: float = 4.5e-6,
        betas: Sequence[float] = (0.5, 0.9), schedule: str = "constant", warmup_steps: int = 0,
        gradient_clip: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        for name, kind, kinds in (
            ("reconstruction", reconstruction, losses.RECONSTRUCTIONS),
            ("adversarial", adversarial, losses.ADVERSARIALS),
        ):
            if kind not in kinds:  # now, and not at the step where it is first used
                raise ValueError(f"{name} must be {' or '.join(map(repr, kinds))}, got {kind!r}")
        self.save_hyperparameters()
        self.automatic_optimization = False  # two optimizers take turns
        self.downsampling = patch_size * 2 ** (len(ch_mult) - 1)
        self.codebook_size = codebook_size
        sizes: dict[str, Any] = dict(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, dropout=dropout,
            resolution=resolution, z_channels=z_channels, patch_size=patch_size, mid_attention=mid_attention,
        )  # fmt: skip
        self.encoder, self.decoder = Encoder(local=local_encoder, **sizes), Decoder(**sizes)
        self.quantize = VectorQuantizer(codebook_size, codebook_dim, distance, revive_after, codebook_momentum)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self.discriminator = PatchDiscriminator(ndf, n_layers) if discriminator_weight > 0 else None
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self._lpips: tuple[nn.Module, ...] = ()  # in a tuple: frozen, so no part of parameters, mode or checkpoints

    # ------------------------------------------------------------------------------------------- images <-> indices

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images -> latents before quantisation, (B, D, h, w)."""
        height, width = images.shape[-2:]
        f = self.downsampling
        if images.ndim != 4 or height % f or width % f:
            near = " or ".join(f"{max(side // f, 1) * f}" for side in (height, width))
            raise ValueError(
                f"images must be (B, 3, H, W) with sides divisible by {f}, got {tuple(images.shape)}; try {near}"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images -> codebook indices, (B, h, w) int64: the row-major sequence s of the paper."""
        return self.quantize(self.encode_latents(images)).indices

    def decode(self, indices: Tensor) -> Tensor:
        """Codebook indices (B, h, w) -> images (B, 3, h * f, w * f)."""
        return self.decode_latents(self.quantize.codes(indices))

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> images (B, 3, h * f, w * f)."""
        return self.decoder(self.post_quant_conv(z_q))

    def autoencode(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images -> reconstruction, and what the quantizer returned."""
        quantized = self.quantize(self.encode_latents(images))
        return self.decode_latents(quantized.z_q), quantized

    def forward(self, images: Tensor) -> Tensor:
        """Images -> reconstruction, both (B, 3, H, W)."""
        return self.autoencode(images)[0]

    # ----------------------------------------------------------------------------------------------------- training

    @property
    def h(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    def configure_optimizers(self) -> Any:
        h = self.h
        generator = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("discriminator.")]
        halves = [generator] + ([list(self.discriminator.parameters())] if self.discriminator else [])
        optimizers = [torch.optim.Adam(half, lr=h.learning_rate, betas=tuple(h.betas)) for half in halves]
        total = self.trainer.estimated_stepping_batches
        return optimizers, [schedule(o, h.schedule, h.warmup_steps, total) for o in optimizers]

    def on_fit_start(self) -> None:
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision must be 32-true or bf16-mixed, got 16-mixed: GAN losses overflow in fp16"
            )
        if self.h.perceptual_weight > 0:
            self._lpips = (losses.load_lpips(self.h.vgg_weights).to(self.device),)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = batch["images"]
        reconstruction, quantized = self.autoencode(images)
        awake = self.discriminator is not None and self.global_step >= self.h.discriminator_start
        self._generator_step(images, reconstruction, quantized, awake)
        if awake:
            self._discriminator_step(images, reconstruction.detach())
        perplexity = usage_and_perplexity(torch.bincount(quantized.indices.flatten(), minlength=self.codebook_size))[1]
        self.log("train/perplexity", perplexity)

    def autoencoder_loss(self, images: Tensor, reconstruction: Tensor, quantized: Quantized) -> dict[str, Tensor]:
        """The terms that need no discriminator, each weighted: they sum up to the loss (Eq. 4 and LPIPS)."""
        h = self.h
        terms = {"reconstruction_loss": losses.reconstruction_loss(images, reconstruction, h.reconstruction)}
        if self._lpips:
            terms["perceptual_loss"] = h.perceptual_weight * self._lpips[0](images, reconstruction).mean()
        terms["codebook_loss"] = h.codebook_weight * quantized.losses["codebook_loss"]
        terms["commitment_loss"] = h.commitment_weight * quantized.losses["commitment_loss"]
        return terms

    def _generator_step(self, images: Tensor, reconstruction: Tensor, quantized: Quantized, awake: bool) -> None:
        optimizers: Any = self.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        self.toggle_optimizer(optimizer)
        terms = self.autoencoder_loss(images, reconstruction, quantized)
        loss = torch.stack(list(terms.values())).sum()
        if awake and self.global_step >= self.h.discriminator_start + self.h.discriminator_warmup:
            adversarial, weight = self._adversarial_loss(terms, reconstruction)
            loss = loss + weight * adversarial
            terms |= {"generator_loss": adversarial, "adaptive_weight": weight}
        self._step(loss, optimizer, 0)
        self.untoggle_optimizer(optimizer)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)

    def _adversarial_loss(self, terms: dict[str, Tensor], reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        adversarial = losses.generator_loss(self.discriminator(reconstruction), self.h.adversarial)
        visible = terms["reconstruction_loss"] + terms.get("perceptual_loss", 0.0)
        weight = losses.adaptive_weight(visible, adversarial, self.decoder.last_layer)
        return adversarial, self.h.discriminator_weight * weight

    def _discriminator_step(self, images: Tensor, reconstruction: Tensor) -> None:
        # the raw optimizer: Lightning's wrapper would count this as a second global step of the same batch
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        optimizer = optimizers[1]
        self.toggle_optimizer(optimizer)
        loss = losses.discriminator_loss(
            self.discriminator(images), self.discriminator(reconstruction), self.h.adversarial
        )
        self._step(loss, optimizer, 1)
        self.untoggle_optimizer(optimizer)
        self.log("train/discriminator_loss", loss.detach(), prog_bar=True)

    def _step(self, loss: Tensor, optimizer: Any, half: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.h.gradient_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.h.gradient_clip)
        optimizer.step()
        schedulers: Any = self.lr_schedulers()
        (schedulers[half] if isinstance(schedulers, list) else schedulers).step()

    # --------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.counts.zero_()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = batch["images"]
        reconstruction, quantized = self.autoencode(images)
        self.counts += torch.bincount(quantized.indices.flatten(), minlength=self.codebook_size)
        terms = self.autoencoder_loss(images, reconstruction, quantized)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        squared = ((reconstruction.clamp(-1, 1) - images) / 2).square().mean(dim=(1, 2, 3))
        terms["psnr"] = -10 * squared.clamp(min=1e-10).log10().mean()  # dB, mean over images; peak 1 for [0, 1]
        self.log_dict({f"val/{name}": v for name, v in terms.items()}, batch_size=len(images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        counts: Any = self.all_gather(self.counts)  # (K,), or (ranks, K)
        usage, perplexity = usage_and_perplexity(counts.view(-1, self.codebook_size).sum(0))
        self.log_dict({"val/codebook_usage": usage, "val/perplexity": perplexity}, sync_dist=False)

    # -------------------------------------------------------------------------------------------------------- files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clipgen_model"] = type(self).__name__

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write a model folder, without the discriminator."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("discriminator.")}
        return files.save_folder(path, type(self).__name__, dict(self.hparams), state, half)

    @classmethod
    def load(cls, path: str | Path) -> VQGAN:
        """Load a model folder, a run folder or a checkpoint of stage 1, in evaluation mode."""
        arguments, state = files.load(path, cls.__name__)
        with files.fitting(path, cls.__name__):
            model = cls(**arguments)
            if not any(name.startswith("discriminator.") for name in state):
                model.discriminator = None
            model.load_state_dict(state)
        return model.eval()
