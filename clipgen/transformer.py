"""Stage 2: the transformer that writes an image's indices, given the CLIP embedding of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from clipgen import losses, sampling
from clipgen.clip import FrozenCLIP
from clipgen.nets.decode import CachedDecoder
from clipgen.nets.gpt import ConditionalGPT2
from clipgen.optim import OPTIMIZERS, make_optimizer, schedule
from clipgen.vqgan import VQGAN
from clipgen.weights import checkpoint as files
from clipgen.weights import hfailab


class ConditionalTransformer(pl.LightningModule):
    """GPT-2 over codebook indices with the CLIP embedding as first token, stage 2 of CLIP-GEN (Eq. 6, 8-10).

    Training needs the frozen pair, see ``attach``; batches then hold ``images`` (B, 3, H, W) in [-1, 1].

    Args:
        n_layer, n_head, n_embd, codebook_size, num_tokens, clip_dim, dropout, tie_head, head_bias, activation,
            grid_positions: see ``ConditionalGPT2``.
        condition_dropout: part of the rows trained without condition, for guidance at sampling (10 % is usual; the
            paper has none).
        condition_cosine: noise on the training condition, as its expected cosine with the clean embedding; 1 is
            none (the paper).
        clip_loss_weight: lambda of Eq. 10 (0.2 in the paper); 0 spares decoder and CLIP their backward pass.
        optimizer: ``"adamw"``, or ``"muon"`` for the matrices of the blocks; see ``optim.make_optimizer``.
        learning_rate, betas, weight_decay: AdamW's; without weight decay it is the paper's Adam.
        schedule, warmup_steps: see ``optim.schedule``.
    """

    def __init__(
        self, *, n_layer: int = 24, n_head: int = 16, n_embd: int = 1024, codebook_size: int = 16384,
        num_tokens: int = 256, clip_dim: int = 512, dropout: float = 0.0, tie_head: bool = True,
        head_bias: bool = False, activation: str = "gelu_pytorch_tanh", grid_positions: bool = False,
        condition_dropout: float = 0.0, condition_cosine: float = 1.0, clip_loss_weight: float = 0.0,
        optimizer: str = "adamw", learning_rate: float = 1e-5, betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0, schedule: str = "constant", warmup_steps: int = 0,
    ):  # fmt: skip
        super().__init__()
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {condition_dropout}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        if not 0 < condition_cosine <= 1:
            raise ValueError(f"condition_cosine must be in (0, 1], got {condition_cosine}")
        self.save_hyperparameters()
        self.num_tokens, self.codebook_size, self.clip_dim = num_tokens, codebook_size, clip_dim
        self.gpt = ConditionalGPT2(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, codebook_size=codebook_size, num_tokens=num_tokens,
            clip_dim=clip_dim, dropout=dropout, tie_head=tie_head, head_bias=head_bias, activation=activation,
            null_condition=condition_dropout > 0, grid_positions=grid_positions,
        )  # fmt: skip
        self._frozen: tuple[VQGAN, FrozenCLIP] | None = None

    def attach(self, vqgan: VQGAN, clip: FrozenCLIP) -> ConditionalTransformer:
        """Give the frozen pair that encodes training images. It is no part of parameters or checkpoints."""
        for name, ours, theirs in (
            ("codebook_size", self.codebook_size, vqgan.codebook_size),
            ("clip_dim", self.clip_dim, clip.embed_dim),
        ):
            if ours != theirs:
                raise ValueError(f"{name} must be {theirs}, as in the frozen models, got {ours}")
        self._frozen = (vqgan.eval().requires_grad_(False), clip)
        return self

    def forward(self, indices: Tensor, clip_embedding: Tensor) -> Tensor:
        """Teacher-forced logits: (B, T), (B, E) -> (B, T, K); ``logits[:, t]`` scores ``indices[:, t]``."""
        return self.gpt(indices, clip_embedding)

    @torch.no_grad()
    def sample(self, clip_embedding: Tensor, *, temperature: float = 1.0, top_k: int = 300, top_p: float = 1.0,
               guidance_scale: float = 1.0, guidance_power: float = 0.0, seed: int | Sequence[int] | None = None,
               given: Tensor | None = None, watch: sampling.Watch | None = None) -> Tensor:  # fmt: skip
        """Draw indices for CLIP embeddings of images or sentences.

        Args:
            clip_embedding: (B, E), unit norm.
            temperature, top_k, top_p: see ``sampling.draw``; k = 300, p = 1 are the paper's.
            guidance_scale: 1 is none; more follows the condition more closely. Needs ``condition_dropout`` in training.
            guidance_power: 0: the same guidance everywhere; above, it grows along the image; below, it fades. See
                ``sampling.guidance_scales``.
            seed: row i draws from ``seed + i``; or one seed a row. A row's indices do not depend on the other rows.
            given: first indices (B, P) to go on from. watch: called with the indices so far, (B, t), at every step.

        Returns:
            (B, T) int64.
        """
        sampling.check_sampling(temperature, top_k, top_p, guidance_scale)
        rows = len(clip_embedding)
        condition = self.gpt.condition(clip_embedding)
        if guidance_scale != 1:
            everything = torch.ones(rows, dtype=torch.bool, device=condition.device)
            condition = torch.cat([condition, self.gpt.condition(clip_embedding, drop=everything)])
        step: sampling.Step = CachedDecoder(self.gpt, condition)  # knows no dropout, in training mode either
        if guidance_scale != 1:
            step = sampling.guided(step, sampling.guidance_scales(guidance_scale, guidance_power, self.num_tokens))
        uniforms = sampling.random_streams(sampling.row_seeds(seed, rows), self.num_tokens, condition.device)
        settings: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        return sampling.decode(step, uniforms, **settings, given=given, watch=watch)

    # ----------------------------------------------------------------------------------------------------- training

    @property
    def h(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    def configure_optimizers(self) -> Any:
        h = self.h
        blocks = self.gpt.transformer.h
        optimizer = make_optimizer(self, blocks, h.optimizer, h.learning_rate, h.betas, h.weight_decay)
        rate = schedule(optimizer, h.schedule, h.warmup_steps, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def frozen(self) -> tuple[VQGAN, FrozenCLIP]:
        """The attached pair, on this module's device."""
        if self._frozen is None:
            raise RuntimeError("training on images needs the frozen models: call transformer.attach(vqgan, clip) first")
        vqgan, clip = self._frozen
        return (vqgan, clip) if vqgan.device == self.device else (vqgan.to(self.device), clip.to(self.device))

    def encoded(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What stage 2 learns from, indices (B, T) and CLIP embeddings (B, E): of a batch's images, or as cached."""
        return self.encode(batch["images"]) if "images" in batch else (batch["indices"], batch["clip_embedding"])

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> indices (B, T) and CLIP embeddings (B, E)."""
        vqgan, clip = self.frozen()
        indices = rearrange(vqgan.encode(images), "b h w -> b (h w)")
        if indices.shape[1] != self.num_tokens:
            raise ValueError(
                f"num_tokens must be {indices.shape[1]} for images of {tuple(images.shape[-2:])}, got {self.num_tokens}"
            )
        return indices, clip.encode_image(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        indices, clip_embedding = self.encoded(batch)
        condition = losses.noisy_condition(clip_embedding, self.h.condition_cosine)
        drop = None
        if self.h.condition_dropout > 0:
            drop = torch.rand(len(indices), device=indices.device) < self.h.condition_dropout
        logits = self.gpt(indices, condition, drop)
        loss = F.cross_entropy(logits.flatten(0, 1), indices.flatten())  # Eq. 8, a token
        self.log("train/cross_entropy", loss.detach(), prog_bar=True)
        if self.h.clip_loss_weight > 0:
            clip_loss = self.clip_loss(logits, clip_embedding)
            self.log("train/clip_loss", clip_loss.detach())
            loss = loss + self.h.clip_loss_weight * clip_loss  # Eq. 10
        self.log("train/loss", loss.detach())
        return loss

    def clip_loss(self, logits: Tensor, clip_embedding: Tensor) -> Tensor:
        """L_CLIP (Eq. 9) of the most likely indices' picture, differentiable by a straight-through arg max."""
        vqgan, clip = self.frozen()
        p = logits.softmax(dim=-1)
        one_hot = F.one_hot(p.argmax(dim=-1), p.shape[-1]).to(p)
        codes = (one_hot + p - p.detach()) @ vqgan.codebook  # (B, T, D)
        z_q = rearrange(codes, "b (h w) d -> b d h w", h=math.isqrt(self.num_tokens))
        return losses.clip_loss(clip.encode_image(vqgan.decode_latents(z_q)), clip_embedding)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        indices, clip_embedding = self.encoded(batch)
        loss = F.cross_entropy(self.gpt(indices, clip_embedding).flatten(0, 1), indices.flatten())
        self.log("val/cross_entropy", loss, batch_size=len(indices), prog_bar=True, sync_dist=True)

    # -------------------------------------------------------------------------------------------------------- files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clipgen_model"] = type(self).__name__

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write a model folder."""
        return files.save_folder(path, type(self).__name__, dict(self.hparams), self.state_dict(), half)

    @classmethod
    def load(cls, path: str | Path) -> ConditionalTransformer:
        """Load a model folder, a run folder or a checkpoint of stage 2, in evaluation mode."""
        arguments, state = files.load(path, cls.__name__)
        with files.fitting(path, cls.__name__):
            model = cls(**arguments)
            model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_hfailab(cls, checkpoint: str | Path, n_head: int | None = None) -> ConditionalTransformer:
        """Load ``gpt_*.pt`` of HFAiLab/clip-gen, in evaluation mode.

        Args:
            n_head: heads leave no trace in the weights; None: they are 64 wide, as in all sizes of that project.
        """
        arguments, state = hfailab.transformer(checkpoint, n_head)
        with files.fitting(checkpoint, cls.__name__):
            model = cls(**arguments)
            model.load_state_dict(state)
        return model.eval()
