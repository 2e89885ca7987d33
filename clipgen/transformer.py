"""Stage 2: the transformer that writes an image's indices, given the CLIP embedding of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from clipgen import sampling
from clipgen.checkpoint import gpt2, hfailab, model_folder
from clipgen.checkpoint.safe_load import below
from clipgen.clip import FrozenCLIP
from clipgen.generation.modality_gap import add_condition_noise
from clipgen.images import images_from_batch
from clipgen.models import losses
from clipgen.models.gpt import ConditionalGPT2
from clipgen.models.kv_cache import CompiledDecoder, IncrementalDecoder
from clipgen.optim import EMA, OPTIMIZERS, make_optimizer, schedule
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    from typing_extensions import Self


class ConditionalTransformer(pl.LightningModule):
    """GPT-2 over codebook indices with the CLIP embedding as first token, stage 2 of CLIP-GEN (Eq. 6, 8-10).

    Training needs the frozen pair, see ``attach``; batches are then ``{"images": (B, 3, H, W) in [-1, 1]}``. Without it
    they are ``{"indices": (B, T), "clip_embedding": (B, E)}``, what ``TokenCacheDataset`` gives.

    Args:
        n_layer, n_head, n_embd, codebook_size, num_tokens, clip_dim, dropout, tie_head, head_bias, activation,
            grid_positions, checkpointing: see ``ConditionalGPT2``.
        condition_dropout: part of the rows trained without condition, for guidance at sampling (10 % is usual; the
            paper has none).
        condition_cosine: noise on the training condition, as its expected cosine with the clean embedding; 1 is
            none (the paper).
        clip_loss_weight: lambda of Eq. 10 (0.2 in the paper); 0 spares decoder and CLIP their backward pass.
        clip_loss_codes: which codes are decoded for it; see ``losses.differentiable_codes``. clip_loss_kind:
            ``"log"`` (Eq. 9) or ``"cosine"``; see ``losses.clip_loss``.
        clip_loss_every: optimizer steps from one with this loss to the next, where it then weighs as many times as
            much (lazy regularisation, arXiv:1912.04958, Sec. 3.1). clip_loss_fraction: part of a batch's rows that
            it is computed on, at least one.
        ema_decay: of the average over the weights of past steps, which evaluation and files then use; 0 keeps none.
        optimizer: ``"adamw"``, or ``"muon"`` for the matrices of the blocks; see ``optim.make_optimizer``.
        learning_rate, betas, weight_decay: AdamW's; without weight decay it is the paper's Adam.
        schedule, warmup_steps: see ``optim.schedule``.
        compile: train by torch.compile.
    """

    last_is_best = False  # the finished model is the one of the lowest validation loss

    def __init__(
        self,
        *,
        n_layer: int = 24,
        n_head: int = 16,
        n_embd: int = 1024,
        codebook_size: int = 16384,
        num_tokens: int = 256,
        clip_dim: int = 512,
        dropout: float = 0.0,
        tie_head: bool = True,
        head_bias: bool = False,
        activation: str = "gelu_pytorch_tanh",
        grid_positions: bool = False,
        checkpointing: bool = False,
        condition_dropout: float = 0.0,
        condition_cosine: float = 1.0,
        clip_loss_weight: float = 0.0,
        clip_loss_codes: str = "straight_through",
        clip_loss_kind: str = "log",
        clip_loss_every: int = 1,
        clip_loss_fraction: float = 1.0,
        ema_decay: float = 0.0,
        optimizer: str = "adamw",
        learning_rate: float = 1e-5,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        compile: bool = False,
    ):
        super().__init__()
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {condition_dropout}")
        for name, kind, kinds in (
            ("optimizer", optimizer, OPTIMIZERS),
            ("clip_loss_codes", clip_loss_codes, losses.CLIP_LOSS_CODES),
            ("clip_loss_kind", clip_loss_kind, losses.CLIP_LOSSES),
        ):
            if kind not in kinds:  # now, and not at the step where it is first used
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {kind!r}")
        if not 0 < condition_cosine <= 1:
            raise ValueError(f"condition_cosine must be in (0, 1], got {condition_cosine}")
        if clip_loss_every < 1:
            raise ValueError(f"clip_loss_every must be at least 1, got {clip_loss_every}")
        if not 0 < clip_loss_fraction <= 1:
            raise ValueError(f"clip_loss_fraction must be in (0, 1], got {clip_loss_fraction}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        self.save_hyperparameters()
        self.hparams.update({name: model_folder.plain(value) for name, value in self.hparams.items()})
        self.num_tokens, self.codebook_size, self.clip_dim = num_tokens, codebook_size, clip_dim
        self.gpt = ConditionalGPT2(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            codebook_size=codebook_size,
            num_tokens=num_tokens,
            clip_dim=clip_dim,
            dropout=dropout,
            tie_head=tie_head,
            head_bias=head_bias,
            activation=activation,
            null_condition=condition_dropout > 0,
            grid_positions=grid_positions,
            checkpointing=checkpointing,
        )
        self.ema = EMA(self.gpt, ema_decay) if ema_decay > 0 else None
        self._frozen: tuple[VQGAN, FrozenCLIP] | None = None
        self.compiled = False  # see ``compile_decoder``
        self.decoders: dict[Any, CompiledDecoder] = {}  # by batch size, device and dtype

    def attach(self, vqgan: VQGAN, clip: FrozenCLIP) -> ConditionalTransformer:
        """Give the pair that encodes training images, and freeze it. It is no part of parameters or checkpoints."""
        for name, ours, theirs in (
            ("codebook_size", self.codebook_size, vqgan.codebook_size),
            ("clip_dim", self.clip_dim, clip.embed_dim),
        ):
            if ours != theirs:
                raise ValueError(f"{name} must be {theirs}, as in the frozen models, got {ours}")
        self._frozen = (vqgan.eval().requires_grad_(False), clip)
        return self

    @property
    def network(self) -> ConditionalGPT2:
        """The network that draws and is evaluated: the averaged one, where there is one."""
        net: Any = self.ema.module if self.ema is not None and self.ema.started else self.gpt
        return net

    def forward(self, indices: Tensor, clip_embedding: Tensor) -> Tensor:
        """Teacher-forced logits: (B, T), (B, E) -> (B, T, K); ``logits[:, t]`` scores ``indices[:, t]``."""
        if indices.ndim != 2:
            raise ValueError(f"indices must be (B, T), rows of a grid one after another, got {tuple(indices.shape)}")
        return (self.gpt if self.training else self.network)(indices, clip_embedding)

    @torch.no_grad()
    def sample(
        self,
        clip_embedding: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 300,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_power: float = 0.0,
        seed: int | Sequence[int] | None = None,
        uniforms: Tensor | None = None,
        given: Tensor | None = None,
        watch: sampling.Watch | None = None,
    ) -> Tensor:
        """Draw indices for CLIP embeddings of images or sentences.

        Args:
            clip_embedding: (B, E), unit norm.
            temperature, top_k, top_p: see ``sampling.draw``; k = 300, p = 1 are the paper's.
            guidance_scale: 1 is none; more follows the condition more closely. Needs ``condition_dropout`` in training.
            guidance_power: 0: the same guidance everywhere; above, it grows along the image; below, it fades. See
                ``sampling.guidance_scales``.
            seed: row i draws from ``seed + i``; or one seed a row. A row's indices do not depend on the other rows.
            uniforms: (B, T) in [0, 1), what the indices are drawn by, instead of a seed.
            given: first indices (B, P) to go on from. watch: called with the indices so far, (B, t), at every step.

        Returns:
            (B, T) int64.
        """
        sampling.check_sampling(temperature, top_k, top_p, guidance_scale, guidance_power)
        rows, net = len(clip_embedding), self.network
        self._check_sizes(clip_embedding, uniforms, given)
        condition = net.condition(clip_embedding)
        if guidance_scale != 1:
            everything = torch.ones(rows, dtype=torch.bool, device=condition.device)
            condition = torch.cat([condition, net.condition(clip_embedding, drop=everything)])
        step = self._decoder(condition).start(condition)  # knows no dropout, in training mode either
        if guidance_scale != 1:
            step = sampling.guided(step, sampling.guidance_scales(guidance_scale, guidance_power, self.num_tokens))
        if uniforms is None:
            uniforms = sampling.per_sample_uniforms(
                sampling.per_sample_seeds(seed, rows), self.num_tokens, condition.device
            )
        settings: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        return sampling.decode(step, uniforms, **settings, given=given, watch=watch)

    def _check_sizes(self, clip_embedding: Tensor, uniforms: Tensor | None, given: Tensor | None) -> None:
        rows, length = len(clip_embedding), self.num_tokens
        if clip_embedding.shape != (rows, self.clip_dim) or not rows:
            raise ValueError(f"clip_embedding must be (B, {self.clip_dim}), got {tuple(clip_embedding.shape)}")
        if uniforms is not None and uniforms.shape != (rows, length):
            raise ValueError(f"uniforms must be {(rows, length)}, got {tuple(uniforms.shape)}")
        if given is not None and (given.ndim != 2 or len(given) != rows or given.shape[1] > length):
            raise ValueError(f"given must be ({rows}, P) with P at most {length}, got {tuple(given.shape)}")

    def compile_decoder(self) -> ConditionalTransformer:
        """Let ``sample`` run by torch.compile, on a GPU as CUDA graphs: the first images of each power of two of rows
        wait for it a minute or so. Its memory is kept, and used by one call at a time."""
        self.compiled = True
        return self

    def clear_decoder_cache(self) -> None:
        """Give back what compiled decoders hold; the next images wait for their compilation again."""
        self.decoders.clear()

    def decoder_cache_nbytes(self) -> int:
        """What the caches of compiled decoders hold."""
        return sum(2 * keys.nbytes for decoder in self.decoders.values() for keys in decoder.keys)

    def _decoder(self, condition: Tensor) -> IncrementalDecoder:
        if not self.compiled:
            return IncrementalDecoder(self.network, len(condition))
        rows = 2 ** (len(condition) - 1).bit_length()
        key = rows, condition.device, condition.dtype, id(self.network.head.weight)  # moved, cast, or replaced
        if key not in self.decoders:
            self.decoders[key] = CompiledDecoder(self.network, rows)
        return self.decoders[key]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the compiled decoders, which hold on to the weights."""
        return super().__getstate__() | {"decoders": {}}  # Lightning leaves its trainer out

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

    def configure_model(self) -> None:
        """Share the weights out over the processes, where the trainer's strategy brings a mesh of devices: FSDP."""
        if self.device_mesh is None or isinstance(self.gpt, FSDPModule):
            return
        nets: list[Any] = [self.gpt] if self.ema is None else [self.gpt, self.ema.module]
        for net in nets:  # what lies outside the blocks stays together: the head may be the index embedding
            for part in (*net.transformer.h, net):  # reshard after forward too: after validation's no backward would
                fully_shard(part, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)

    def on_fit_start(self) -> None:
        self.train()  # what was loaded is in evaluation mode, and Lightning leaves it there
        if self.h.compile:
            self.gpt.compile()  # in place: the names of parameters stay

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        if self.ema is not None:
            self.ema.update_parameters(self.gpt)

    def frozen(self) -> tuple[VQGAN, FrozenCLIP]:
        """The attached pair, on this module's device."""
        if self._frozen is None:
            raise RuntimeError("training on images needs the frozen models: call transformer.attach(vqgan, clip) first")
        vqgan, clip = self._frozen
        return (vqgan, clip) if vqgan.device == self.device else (vqgan.to(self.device), clip.to(self.device))

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What stage 2 learns from, indices (B, T) and CLIP embeddings (B, E): of a batch's images, or as cached."""
        if {"indices", "clip_embedding"} <= set(batch):
            return batch["indices"], batch["clip_embedding"]
        return self.encode(images_from_batch(batch))

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> indices (B, T) and CLIP embeddings (B, E)."""
        vqgan, clip = self.frozen()
        if images.shape[-2] != images.shape[-1]:
            raise ValueError(f"images must be square, as those that are drawn, got {tuple(images.shape)}")
        indices = rearrange(vqgan.encode(images), "b h w -> b (h w)")
        if indices.shape[1] != self.num_tokens:
            raise ValueError(
                f"num_tokens must be {indices.shape[1]} for images of {tuple(images.shape[-2:])}, got {self.num_tokens}"
            )
        return indices, clip.encode_image(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        indices, clip_embedding = self.inputs(batch)
        condition = add_condition_noise(clip_embedding, self.h.condition_cosine)
        drop = None
        if self.h.condition_dropout > 0:
            drop = torch.rand(len(indices), device=indices.device) < self.h.condition_dropout
        loss, logits = self.gpt(indices, condition, drop, with_loss=True)
        self.log("train/cross_entropy", loss.detach())
        if self.h.clip_loss_weight > 0 and self.global_step % self.h.clip_loss_every == 0:
            clip_loss = self.clip_loss(logits, clip_embedding)
            self.log("train/clip_loss", clip_loss.detach())
            loss = loss + self.h.clip_loss_weight * self.h.clip_loss_every * clip_loss  # Eq. 10
        self.log("train/loss", loss.detach())
        return loss

    def clip_loss(self, logits: Tensor, clip_embedding: Tensor) -> Tensor:
        """L_CLIP (Eq. 9) of the picture that logits choose, on the first rows: the order of a batch is random."""
        vqgan, clip = self.frozen()
        rows = max(round(self.h.clip_loss_fraction * len(logits)), 1)
        codes = losses.differentiable_codes(logits[:rows], vqgan.codebook, self.h.clip_loss_codes)  # (rows, T, D)
        z_q = rearrange(codes, "b (h w) d -> b d h w", h=math.isqrt(self.num_tokens))
        generated = clip.encode_image(vqgan.decode_latents(z_q))
        return losses.clip_loss(generated, clip_embedding[:rows], self.h.clip_loss_kind)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        indices, clip_embedding = self.inputs(batch)
        loss, _ = self.network(indices, clip_embedding, with_loss=True)
        self.log("val/cross_entropy", loss, batch_size=losses.ddp_batch_size(len(indices)), sync_dist=True)

    # -------------------------------------------------------------------------------------------------------- files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clipgen_model"] = model_folder.kind(type(self))

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write a model folder; of the averaged weights, where there are any."""
        state = {f"gpt.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return model_folder.save_folder(path, model_folder.kind(type(self)), dict(self.hparams), state, half)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a model folder, a run folder or a checkpoint of stage 2, ``"shapes"`` (bundled), or the transformer of a
        pipeline ``"hf-hub:OWNER/NAME"``; in evaluation mode."""
        arguments, state = model_folder.load(path, model_folder.kind(cls))
        if not below("ema.", state):  # a folder holds one network: allocate no average beside it
            arguments = arguments | {"ema_decay": 0.0}
        with model_folder.fitting(path, cls.__name__):
            model = cls(**arguments)
            model.load_state_dict(state)
        return model.eval()

    def init_from_gpt2(self, name: str | Path) -> ConditionalTransformer:
        """Take over what a GPT-2 learned from language: its blocks and last norm, and its positions unless
        ``grid_positions`` asks for others.

        The heads that look one or a few places back find them by the positions, so blocks alone would lose them; of
        1024 positions the first ``num_tokens`` are taken, of fewer all. Words are no indices: their embedding is not.

        Args:
            name: a name on the Hugging Face hub (``"gpt2"``, ``"gpt2-medium"``), or a folder of ``save_pretrained``.

        Raises:
            ValueError: it cannot be had, is no GPT-2, or is of another size; says which.
        """
        net: Any = self.gpt.transformer
        state = gpt2.load_gpt2_weights(name, net.config)
        for part in ("h", "ln_f"):
            getattr(net, part).load_state_dict(below(f"{part}.", state))
        if not self.h.grid_positions:
            positions = state["wpe.weight"][: self.num_tokens]
            net.wpe.weight.data[: len(positions)] = positions
        if self.ema is not None:
            self.network.load_state_dict(self.gpt.state_dict())
        return self

    @classmethod
    def from_hfailab(cls, checkpoint: str | Path, n_head: int | None = None) -> Self:
        """Load ``gpt_*.pt`` of HFAiLab/clip-gen, in evaluation mode.

        Args:
            n_head: heads leave no trace in the weights; None: they are 64 wide, as in all sizes of that project.
        """
        with model_folder.fitting(checkpoint, cls.__name__):
            arguments, state = hfailab.transformer(checkpoint, n_head)
            model = cls(**arguments)
            model.load_state_dict(state)
        return model.eval()
