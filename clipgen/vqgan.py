"""Stage 1: VQ-GAN, which turns an image into a short row of codebook indices and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from clipgen.checkpoint import hfailab, model_folder, taming
from clipgen.checkpoint.safe_load import below
from clipgen.images import check_images, images_from_batch, to_bytes
from clipgen.models import losses
from clipgen.models.autoencoder import Autoencoder
from clipgen.models.discriminator import PatchDiscriminator
from clipgen.models.lpips import load_lpips, lpips_from_state
from clipgen.models.quantizers.vector import QuantizerOutput, code_counts, usage_and_perplexity
from clipgen.optim import EMA, optimizer_steps, schedule

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

TOKENIZER = (  # the arguments that decide, with the weights, what images become
    "quantizer",
    "codebook_size",
    "codebook_dim",
    "levels",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "resolution",
    "z_channels",
    "patch_size",
    "mid_attention",
    "local_encoder",
    "norm_eps",
)
NETWORK = (*TOKENIZER, "resamp_with_conv", "ndf", "n_layers")  # those that decide which weights fit
PARTS = ("discriminator.", "lpips.")  # what a model folder may hold beside the tokenizer


class VQGAN(pl.LightningModule):
    """VQ-GAN (arXiv:2012.09841), stage 1 of CLIP-GEN: reconstruction + codebook + commitment (Eq. 4) + perceptual +
    adversarial (Eq. 5) loss, with the adaptive weight.

    Images are (B, 3, H, W) in [-1, 1]; height and width are divisible by f = ``patch_size * 2 ** (len(ch_mult) - 1)``.
    Batches of training are ``{"images": images}``.

    Args:
        quantizer, codebook_size, codebook_dim, levels, norm_eps, local_encoder: see ``Autoencoder``.
        dead_code_reset_after, codebook_ema_decay, kmeans_iters: see ``VectorQuantizer``.
        ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels, patch_size, mid_attention,
            resamp_with_conv, dropout, checkpointing: see ``Encoder``.
        reconstruction: ``"l1"`` or ``"l2"``.
        codebook_weight, commitment_weight: of the two terms of Eq. 4; beta of VQ-VAE is the second. (Published weights
            were trained with beta on the first: 0.25 and 1 continue them as they began.)
        entropy_weight: of LFQ's. kl_weight: of Gumbel's.
        perceptual_weight: of LPIPS; 0 needs no VGG weights. vgg_weights: their file, else torchvision's cache.
        discriminator_weight: 0 trains no discriminator. discriminator_start: the step at which it wakes up (25 000 in
            the paper; before it neither half of the GAN trains). discriminator_warmup: steps that it then trains alone
            before its gradient reaches the generator. ndf: its width. n_layers: its strided layers.
        adversarial: ``"hinge"`` or ``"log"`` (Eq. 5). adaptive_weight_max: bound of the adaptive weight.
        lecam_weight: of LeCam's regularisation of the discriminator; 0 is none.
        ema_decay: of the average over the weights of past steps, which evaluation and files then use; 0 keeps none.
        learning_rate, betas: Adam's, both halves. schedule, warmup_steps: see ``optim.schedule``; the discriminator
            warms up when it wakes.
        gradient_clip: largest gradient norm of either half; 0 does not clip.
        accumulate: batches a step. compile: by torch.compile. channels_last: memory format of images and weights.
    """

    counts: Tensor
    discriminator: Any  # PatchDiscriminator, or None

    def __init__(
        self,
        *,
        quantizer: str = "euclidean",
        codebook_size: int = 16384,
        codebook_dim: int = 256,
        levels: Sequence[int] | None = None,
        dead_code_reset_after: int = 0,
        codebook_ema_decay: float = 0.0,
        kmeans_iters: int = 0,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        patch_size: int = 1,
        mid_attention: bool = True,
        resamp_with_conv: bool = True,
        local_encoder: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        checkpointing: bool = False,
        reconstruction: str = "l1",
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        kl_weight: float = 1e-8,
        perceptual_weight: float = 1.0,
        vgg_weights: str | None = None,
        discriminator_weight: float = 0.8,
        discriminator_start: int = 25_000,
        discriminator_warmup: int = 0,
        ndf: int = 64,
        n_layers: int = 3,
        adversarial: str = "hinge",
        adaptive_weight_max: float = 1e4,
        lecam_weight: float = 0.0,
        ema_decay: float = 0.0,
        learning_rate: float = 4.5e-6,
        betas: Sequence[float] = (0.5, 0.9),
        schedule: str = "constant",
        warmup_steps: int = 0,
        gradient_clip: float = 0.0,
        accumulate: int = 1,
        compile: bool = False,
        channels_last: bool = False,
    ):
        super().__init__()
        for name, kind, kinds in (
            ("reconstruction", reconstruction, losses.RECONSTRUCTIONS),
            ("adversarial", adversarial, losses.ADVERSARIALS),
        ):
            if kind not in kinds:  # now, and not at the step where it is first used
                raise ValueError(f"{name} must be {' or '.join(map(repr, kinds))}, got {kind!r}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        self.save_hyperparameters()
        self.hparams.update({name: model_folder.plain(value) for name, value in self.hparams.items()})
        self.automatic_optimization = False  # two optimizers take turns
        self.downsampling = patch_size * 2 ** (len(ch_mult) - 1)
        self.codebook_size = codebook_size
        self.autoencoder = Autoencoder(
            quantizer=quantizer,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            levels=levels,
            dead_code_reset_after=dead_code_reset_after,
            codebook_ema_decay=codebook_ema_decay,
            kmeans_iters=kmeans_iters,
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            resolution=resolution,
            z_channels=z_channels,
            patch_size=patch_size,
            mid_attention=mid_attention,
            resamp_with_conv=resamp_with_conv,
            local_encoder=local_encoder,
            norm_eps=norm_eps,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.ema = EMA(self.autoencoder, ema_decay) if ema_decay > 0 else None
        self.discriminator = PatchDiscriminator(ndf, n_layers) if discriminator_weight > 0 else None
        self.lecam = losses.LeCam() if discriminator_weight > 0 and lecam_weight > 0 else None
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self._lpips: tuple[nn.Module, ...] = ()  # in a tuple: frozen, so no part of parameters, mode or checkpoints

    # ------------------------------------------------------------------------------------------- images <-> indices

    @property
    def tokenizer(self) -> Autoencoder:
        """The network that images go through: in evaluation the averaged one, where there is one."""
        return self.autoencoder if self.training else self._delivered

    @property
    def _delivered(self) -> Autoencoder:
        net: Any = self.ema.module if self.ema is not None and self.ema.started else self.autoencoder
        return net

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self.tokenizer.quantize.codebook

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images -> latents before quantisation, (B, D, h, w)."""
        self._check_size(images)
        return self.tokenizer.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Images -> codebook indices, (B, h, w) int64: the row-major sequence s of the paper. For a model in evaluation
        mode: in training mode the codes move with what they see."""
        return self.tokenizer.quantize(self.encode_latents(images)).indices

    def decode(self, indices: Tensor) -> Tensor:
        """Codebook indices (B, h, w) -> images (B, 3, h * f, w * f)."""
        if indices.ndim != 3:
            raise ValueError(f"indices must be (B, h, w), got {tuple(indices.shape)}")
        return self.decode_latents(self.tokenizer.quantize.codes(indices))

    def decode_latents(self, z_q: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> images (B, 3, h * f, w * f)."""
        return self.tokenizer.decode(z_q)

    def autoencode(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Images -> reconstruction, and what the quantizer returned."""
        self._check_size(images)
        return self.tokenizer(images)

    def forward(self, images: Tensor) -> Tensor:
        """Images -> reconstruction, both (B, 3, H, W)."""
        return self.autoencode(images)[0]

    def _check_size(self, images: Tensor) -> None:
        check_images(images)
        sides, f = images.shape[-2:], self.downsampling
        if any(side % f for side in sides):
            near = [sorted({max(side // f, 1) * f, -(-side // f) * f}) for side in sides]
            height, width = (" or ".join(map(str, either)) for either in near)
            raise ValueError(
                f"images must be (B, 3, H, W) with sides divisible by {f}, got {tuple(images.shape)}; "
                f"try a height of {height} and a width of {width}"
            )

    # ----------------------------------------------------------------------------------------------------- training

    @property
    def h(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    def configure_optimizers(self) -> Any:
        h = self.h
        halves = [self.autoencoder] + ([self.discriminator] if self.discriminator else [])
        parameters = [[p for p in half.parameters() if p.requires_grad] for half in halves]
        adam = partial(torch.optim.Adam, lr=h.learning_rate, betas=tuple(h.betas), fused=True)
        optimizers = [adam(half) for half in parameters]
        total = optimizer_steps(self.trainer, h.accumulate)
        starts = (0, h.discriminator_start)
        return optimizers, [schedule(o, h.schedule, h.warmup_steps, total, at) for o, at in zip(optimizers, starts)]

    def on_fit_start(self) -> None:
        if (precision := self.trainer.precision) not in ("32-true", "bf16-mixed"):
            why = ": GAN losses overflow in fp16" if precision == "16-mixed" else ""
            raise ValueError(f"trainer.precision must be 32-true or bf16-mixed, got {precision}{why}")
        if self.h.discriminator_weight > 0 and self.discriminator is None:
            logger.warning("The tokenizer was loaded without a discriminator, and trains without.")
        if self.h.perceptual_weight > 0:
            _ = self.lpips  # now, and not in the first step
        self.train()  # what was loaded is in evaluation mode, and Lightning leaves it there
        self.apply_speed_options_()

    @property
    def lpips(self) -> nn.Module:
        """The perceptual loss, loaded where it is first needed, on this module's device."""
        if not self._lpips:
            self._lpips = (load_lpips(self.h.vgg_weights),)
        return self._lpips[0].to(self.device)

    def apply_speed_options_(self) -> None:
        """Apply ``channels_last`` and ``compile``; neither changes parameter names, and results by rounding only."""
        if self.h.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.h.compile:
            torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]  # its graph is differentiated twice
            # the decoder's last layer stays out: the adaptive weight asks for its gradient alone
            net: Any = self.autoencoder
            net.encoder.compile()
            net.decoder.trunk = torch.compile(net.decoder.trunk)
            for judge in (self.discriminator, *self._lpips):
                if judge is not None:
                    judge.compile()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = images_from_batch(batch)
        if self.h.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.h.kmeans_iters and self.global_step == batch_idx == 0:
            with torch.no_grad():
                self.autoencoder.quantize.kmeans_init_(self.encode_latents(images))
        if batch_idx % self.h.accumulate == 0:
            self.zero_grad()
        step_now = (batch_idx + 1) % self.h.accumulate == 0 or self.trainer.is_last_batch
        awake = self.discriminator is not None and self.global_step >= self.h.discriminator_start

        reconstruction, quantized = self.autoencode(images)
        # One pass serves both halves: each sees the reconstruction as a leaf, so neither's gradient reaches the other
        leaf = reconstruction.detach().float().requires_grad_()
        logits_fake = self.discriminator(leaf) if awake else None
        terms = self.autoencoder_loss(images, leaf, quantized)
        visible = sum(value for name, value in terms.items() if name not in quantized.losses)
        pixels = self._gradient(visible, terms, leaf, logits_fake, reconstruction)
        quantizer_loss = sum(terms[name] for name in quantized.losses)
        self._step((reconstruction * pixels).sum() + quantizer_loss, 0, step_now)
        if logits_fake is not None:
            self._step(self._discriminator_loss(images, logits_fake), 1, step_now)
        self._log(terms, quantized)

    def autoencoder_loss(self, images: Tensor, reconstruction: Tensor, quantized: QuantizerOutput) -> dict[str, Tensor]:
        """The terms that need no discriminator, each weighted: they sum up to the loss (Eq. 4 and LPIPS)."""
        terms = {"reconstruction_loss": losses.reconstruction_loss(images, reconstruction, self.h.reconstruction)}
        if self.h.perceptual_weight > 0:
            terms["perceptual_loss"] = self.h.perceptual_weight * self.lpips(images, reconstruction).mean()
        weights = {name: self.h[name.replace("loss", "weight")] for name in quantized.losses}
        return terms | {name: weights[name] * value for name, value in quantized.losses.items()}

    def _gradient(
        self, visible: Any, terms: dict[str, Tensor], leaf: Tensor, logits_fake: Tensor | None, reconstruction: Tensor
    ) -> Tensor:
        """The gradient at the reconstruction of what the loss sees of it; the adversarial terms are added to
        ``terms``."""
        gradient = torch.autograd.grad(visible, leaf)[0]
        if logits_fake is None or self.global_step < self.h.discriminator_start + self.h.discriminator_warmup:
            return gradient
        adversarial = losses.generator_loss(logits_fake, self.h.adversarial)
        pull = torch.autograd.grad(adversarial, leaf, retain_graph=True)[0]
        last_layer, bound = self.autoencoder.decoder.last_layer, self.h.adaptive_weight_max
        weight = losses.adaptive_weight(reconstruction, last_layer, gradient, pull, bound)
        weight = self.h.discriminator_weight * weight
        terms |= {"generator_loss": adversarial, "adaptive_weight": weight}
        return gradient + weight * pull

    def _discriminator_loss(self, images: Tensor, logits_fake: Tensor) -> Tensor:
        logits_real = self.discriminator(images)
        loss = losses.discriminator_loss(logits_real, logits_fake, self.h.adversarial)
        logged = {"discriminator_loss": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()})
        if self.lecam is not None:
            lecam_loss = self.h.lecam_weight * self.lecam(logits_real, logits_fake)
            self.log("train/lecam_loss", lecam_loss.detach())
            loss = loss + lecam_loss
        return loss

    def _step(self, loss: Tensor, half: int, now: bool) -> None:
        """Add the loss's gradient to a half of the GAN, and step its optimizer where it is time to."""
        self.manual_backward(loss / self.h.accumulate)
        if not now:
            return
        # the raw one of the discriminator: Lightning's wrapper would count a second global step for the same batch
        optimizers: Any = self.optimizers(use_pl_optimizer=half == 0)
        optimizer = optimizers[half] if isinstance(optimizers, list) else optimizers
        if self.h.gradient_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.h.gradient_clip)
        optimizer.step()
        schedulers: Any = self.lr_schedulers()
        if schedulers is not None:  # a subclass may have none
            (schedulers[half] if isinstance(schedulers, list) else schedulers).step()
        if half == 0 and self.ema is not None:
            self.ema.update_parameters(self.autoencoder)

    def _log(self, terms: dict[str, Tensor], quantized: QuantizerOutput) -> None:
        parts = {name: value.detach() for name, value in terms.items()}
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        adversarial = parts.pop("adaptive_weight", 0.0) * parts.pop("generator_loss", 0.0)
        self.log("train/loss", torch.stack(list(parts.values())).sum() + adversarial)
        self.log("train/perplexity", usage_and_perplexity(code_counts(quantized.indices, self.codebook_size))[1])

    # --------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.counts.zero_()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Log the losses, and PSNR of the reconstruction as a file would hold it, in 8 bits; return that."""
        images = images_from_batch(batch)
        reconstruction, quantized = self.autoencode(images)
        self.counts += code_counts(quantized.indices, self.codebook_size)
        terms = self.autoencoder_loss(images, reconstruction, quantized)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        picture = to_bytes(reconstruction).float() / 127.5 - 1
        squared = ((picture - images) / 2).square().mean(dim=(1, 2, 3))
        terms["psnr"] = -10 * squared.clamp(min=1e-10).log10().mean()  # dB, mean over images; peak 1 for [0, 1]
        logged, weight = {f"val/{name}": v for name, v in terms.items()}, losses.ddp_batch_size(len(images))
        self.log_dict(logged, batch_size=weight, sync_dist=True)
        return picture

    def on_validation_epoch_end(self) -> None:
        counts: Any = self.all_gather(self.counts)  # (K,), or (ranks, K)
        self.counts = counts.view(-1, self.codebook_size).sum(0)
        usage, perplexity = usage_and_perplexity(self.counts)
        dead = (self.counts == 0).sum().float()
        self.log_dict({"val/codebook_usage": usage, "val/perplexity": perplexity, "val/dead_codes": dead})

    # -------------------------------------------------------------------------------------------------------- files

    @property
    def last_is_best(self) -> bool:
        """Whether the last weights are the trained ones, whatever the validation loss says: it does not see what a
        discriminator teaches, and is lowest before that has begun."""
        return self.discriminator is not None and self.global_step > self.h.discriminator_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clipgen_model"] = model_folder.kind(type(self))

    def save(self, path: str | Path, half: bool = False, training: bool = False) -> Path:
        """Write a model folder: the tokenizer; with ``training`` also the discriminator and LPIPS, if there are any."""
        state = self._delivered.state_dict()
        if training:
            for prefix, part in zip(PARTS, (self.discriminator, *self._lpips)):
                state |= {prefix + k: v for k, v in part.state_dict().items()} if part is not None else {}
        return model_folder.save_folder(path, model_folder.kind(type(self)), dict(self.hparams), state, half)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a model folder, a run folder or a checkpoint of stage 1, ``"shapes"`` (bundled), or the tokenizer of a
        pipeline ``"hf-hub:OWNER/NAME"``; in evaluation mode."""
        arguments, state = model_folder.load(path, model_folder.kind(cls))
        with model_folder.fitting(path, cls.__name__):
            model = cls(**arguments | {"kmeans_iters": 0})  # codes that are trained stay where they are
            if any(name.startswith("autoencoder.") for name in state):  # a checkpoint
                if not below("discriminator.", state):  # of a training that went on from a tokenizer alone
                    model.discriminator = model.lecam = None
                model.load_state_dict(state)
                return model.eval()
            return model.with_weights(state)

    @classmethod
    def from_taming(cls, checkpoint: str | Path, config: str | Path | Mapping[str, Any]) -> VQGAN:
        """Load a published VQModel or GumbelVQ of taming-transformers, in evaluation mode.

        Args:
            checkpoint: its ``.ckpt``. Nothing in it is executed. config: its ``.yaml``, or what stands there.

        Raises:
            ValueError: the file is none of theirs, or wants to run code; says which.
        """
        arguments, state = taming.vqgan(checkpoint, config)
        with model_folder.fitting(checkpoint, cls.__name__):
            return cls(**arguments).with_weights(state)

    @classmethod
    def from_hfailab(cls, checkpoint: str | Path) -> VQGAN:
        """Load ``vqgan_*.pt`` of HFAiLab/clip-gen, in evaluation mode."""
        with model_folder.fitting(checkpoint, cls.__name__):
            arguments, state = hfailab.vqgan(checkpoint)
            return cls(**arguments).with_weights(state)

    def with_weights(self, state: dict[str, Tensor]) -> Self:
        """Take over weights as a model folder holds them, in evaluation mode; a discriminator without any goes."""
        self.load_tokenizer(state)
        discriminator, lpips = (below(prefix, state) for prefix in PARTS)
        if not discriminator:
            self.discriminator = self.lecam = None
        elif self.discriminator is not None:
            self.discriminator.load_state_dict(discriminator)
        if any(name.startswith("net.") for name in lpips):  # with VGG, and not its linear layers alone
            self._lpips = (lpips_from_state(lpips),)
        return self.eval()

    def init_from(self, other: VQGAN) -> VQGAN:
        """Go on from another's weights: the tokenizer's, and the discriminator's and LPIPS where it has them."""
        self.load_tokenizer(other.eval().tokenizer.state_dict())
        if self.discriminator is not None and other.discriminator is not None:
            self.discriminator.load_state_dict(other.discriminator.state_dict())
        self._lpips = other._lpips
        return self

    def load_tokenizer(self, state: dict[str, Tensor]) -> None:
        """Take over the tokenizer's weights alone."""
        state = {k: v for k, v in state.items() if not k.startswith(PARTS)}
        for net in (self.autoencoder, *([self.ema.module] if self.ema is not None else [])):
            missing = net.load_state_dict(state, strict=False)
            if unknown := [k for k in (*missing.missing_keys, *missing.unexpected_keys) if k != "quantize.idle"]:
                raise RuntimeError(f"weights do not fit: {', '.join(unknown)}")
