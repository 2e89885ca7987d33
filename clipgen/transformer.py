"""Stage 2: the transformer that predicts the code indices of an image from its CLIP embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from clipgen import sampling
from clipgen.checkpoint import gpt2, hfailab, model_folder
from clipgen.checkpoint.pretrained import PretrainedModule
from clipgen.checkpoint.safe_load import strip_prefix
from clipgen.checkpoint.verified_build import build_verified, named_load_errors
from clipgen.data.samplers import num_real_samples
from clipgen.hardware.device import check_compile, should_compile
from clipgen.images import images_from_batch
from clipgen.models import losses
from clipgen.models.conditioning import Conditioner, add_condition_noise
from clipgen.models.config import (
    LOSS_REDUCTIONS,
    ClipLossConfig,
    ConditioningConfig,
    GPTConfig,
    TransformerOptimizerConfig,
    as_config,
    to_plain,
)
from clipgen.models.gpt import ConditionalGPT2
from clipgen.models.kv_cache import CompiledDecoder, IncrementalDecoder
from clipgen.nonfinite import StepGuard, StopOnNonFinite, check_losses, check_weights
from clipgen.optim import EMA, make_lr_scheduler, make_optimizer
from clipgen.sampling_params import SamplingParams, resolve_params
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    from typing_extensions import Self


# Names of the weights that are one tensor with ``tie_embeddings``; a model folder contains it once.
HEAD_WEIGHT = "gpt.head.weight"
TOKEN_EMBEDDING = "gpt.transformer.wte.weight"


class ConditionalTransformer(PretrainedModule, pl.LightningModule):
    """GPT-2 over code indices with the CLIP embedding as its first token, stage 2 of CLIP-GEN (Eq. 6, 8-10).

    Training on images needs the frozen VQ-GAN and CLIP, see ``attach_encoders``; batches are then
    ``{"images": (B, 3, H, W) in [-1, 1]}``. Without them batches are ``{"indices": (B, T), "condition": (B, E)}``, as
    ``TokenCacheDataset`` returns them.

    Args:
        conditioning: noise and dropout of the condition in training, see ``ConditioningConfig``.
        clip_loss: the CLIP loss (Eq. 9, 10), see ``ClipLossConfig``.
        optimizer: optimizer, schedule and EMA, see ``TransformerOptimizerConfig``.
        loss_reduction: ``"mean"`` adds the mean cross-entropy per token and the CLIP loss; ``"sum"`` adds that of the
            whole sequence, as Eq. 8 prints.
        compile: compile the training step with torch.compile; "auto" on a GPU only.
        network: the fields of ``GPTConfig``: n_layer, n_head, n_embd, codebook_size, num_tokens, clip_dim, ...
    """

    last_is_best = False  # export the checkpoint with the lowest validation loss

    def __init__(
        self,
        *,
        conditioning: ConditioningConfig | Mapping[str, Any] | None = None,
        clip_loss: ClipLossConfig | Mapping[str, Any] | None = None,
        optimizer: TransformerOptimizerConfig | Mapping[str, Any] | None = None,
        loss_reduction: str = "mean",
        compile: bool | str = False,
        **network: Any,
    ):
        super().__init__()
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {', '.join(LOSS_REDUCTIONS)}, got {loss_reduction!r}")
        self.gpt_config = as_config(GPTConfig, network)
        self.conditioning_config = as_config(ConditioningConfig, conditioning)
        self.clip_loss_config = as_config(ClipLossConfig, clip_loss)
        self.optimizer_config = as_config(TransformerOptimizerConfig, optimizer)
        self.save_hyperparameters(self._arguments(loss_reduction, compile))
        self.num_tokens = self.gpt_config.num_tokens
        self.codebook_size = self.gpt_config.codebook_size
        self.clip_dim = self.gpt_config.clip_dim
        self.gpt = ConditionalGPT2(self.gpt_config, null_condition=self.conditioning_config.drop_prob > 0)
        ema_decay = self.optimizer_config.ema_decay
        self.ema = EMA(self.gpt, ema_decay) if ema_decay > 0 else None
        # The buffers are equal on all ranks. A broadcast by DDP would make ranks with fewer validation batches wait.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.guard = StepGuard(self.optimizer_config.max_skipped_steps)
        self.averages = losses.Averages()
        # In a tuple, so that the frozen models are not part of parameters, mode or checkpoints.
        self._encoders: tuple[VQGAN, Conditioner] | None = None
        self.compiled = False  # see ``compile_decoder``
        # The compiled decoders by batch size, device, dtype and weights.
        self.decoders: dict[Any, CompiledDecoder] = {}

    def _arguments(self, loss_reduction: str, compile: bool | str) -> dict[str, Any]:
        """Return the constructor's arguments as plain values, which checkpoints and model folders store."""
        return {
            **to_plain(self.gpt_config),
            "conditioning": to_plain(self.conditioning_config),
            "clip_loss": to_plain(self.clip_loss_config),
            "optimizer": to_plain(self.optimizer_config),
            "loss_reduction": loss_reduction,
            "compile": check_compile(compile),
        }

    def attach_encoders(self, vqgan: VQGAN, clip: Conditioner) -> ConditionalTransformer:
        """Attach and freeze the VQ-GAN and CLIP (or another ``Conditioner``) that encode training images.

        They are excluded from ``parameters()`` and from checkpoints.

        Raises:
            ValueError: the codebook size or the dimension of the embeddings differs from the transformer's.
        """
        for name, value, expected in (
            ("codebook_size", self.codebook_size, vqgan.codebook_size),
            ("clip_dim", self.clip_dim, clip.embed_dim),
        ):
            if value != expected:
                raise ValueError(f"{name} must be {expected}, as in the frozen models, got {value}")
        self._encoders = (vqgan.eval().requires_grad_(False), clip)
        return self

    @property
    def eval_model(self) -> ConditionalGPT2:
        """The network used for sampling and evaluation: the EMA weights if there are any, else the trained ones."""
        net: Any = self.ema.module if self.ema is not None and self.ema.initialized else self.gpt
        return net

    def forward(self, indices: Tensor, clip_embedding: Tensor) -> Tensor:
        """Return teacher-forced logits: (B, T), (B, E) -> (B, T, K); ``logits[:, t]`` scores ``indices[:, t]``.

        Raises:
            ValueError: the indices have another shape.
        """
        if indices.ndim != 2:
            raise ValueError(f"indices must be (B, T), in row-major order, got {tuple(indices.shape)}")
        return (self.gpt if self.training else self.eval_model)(indices, clip_embedding)

    @torch.no_grad()
    def sample(
        self,
        clip_embedding: Tensor,
        params: SamplingParams | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        uniforms: Tensor | None = None,
        prefix: Tensor | None = None,
        callback: sampling.StepCallback | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Sample code indices for CLIP embeddings of images or texts.

        Args:
            clip_embedding: (B, E), unit norm.
            params: sampling parameters.
            seed: sample i uses ``seed + i``; or one seed per sample. A sample does not depend on the rest of the batch.
            uniforms: (B, T) uniform random numbers in [0, 1) for inverse-CDF sampling; override ``seed``.
            prefix: the first indices (B, P), which are kept as they are.
            callback: called at every step with all indices so far, (B, t).
            overrides: fields of ``SamplingParams`` by name, which override those of ``params``: temperature, top_k,
                top_p, guidance_scale, guidance_power.

        Returns:
            (B, T) int64.

        Raises:
            TypeError: a name is not a field of ``SamplingParams``.
            ValueError: a tensor has another shape, a parameter or seed is out of range, or guidance is used without a
                null condition.
        """
        params = resolve_params(params, overrides)
        self._check_shapes(clip_embedding, uniforms, prefix)
        condition_tokens = self._condition_tokens(clip_embedding, params)
        if uniforms is None:
            seeds = sampling.per_sample_seeds(seed, len(clip_embedding))
            uniforms = sampling.per_sample_uniforms(seeds, self.num_tokens, clip_embedding.device)
        sample_fn = self._decoder(condition_tokens).start_sampling(condition_tokens, uniforms, params)
        return sampling.sample_sequence(sample_fn, uniforms.shape, uniforms.device, prefix=prefix, callback=callback)

    def _condition_tokens(self, clip_embedding: Tensor, params: SamplingParams) -> Tensor:
        """Return the condition tokens (B, C); with guidance (2 B, C), followed by those of the null condition."""
        tokens = self.eval_model.condition_tokens(clip_embedding)
        if not params.uses_guidance:
            return tokens
        drop_all = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        return torch.cat([tokens, self.eval_model.condition_tokens(clip_embedding, drop=drop_all)])

    def _check_shapes(self, clip_embedding: Tensor, uniforms: Tensor | None, prefix: Tensor | None) -> None:
        batch_size = len(clip_embedding)
        length = self.num_tokens
        if clip_embedding.shape != (batch_size, self.clip_dim) or not batch_size:
            raise ValueError(f"clip_embedding must be (B, {self.clip_dim}), got {tuple(clip_embedding.shape)}")
        if uniforms is not None and uniforms.shape != (batch_size, length):
            raise ValueError(f"uniforms must be {(batch_size, length)}, got {tuple(uniforms.shape)}")
        if prefix is not None and (prefix.ndim != 2 or len(prefix) != batch_size or prefix.shape[1] > length):
            raise ValueError(f"prefix must be ({batch_size}, P) with P at most {length}, got {tuple(prefix.shape)}")

    def compile_decoder(self) -> ConditionalTransformer:
        """Compile the decoding step of ``sample``, into CUDA graphs on a GPU.

        Batch sizes are rounded up to a power of two; the first call at each size takes about a minute. Buffers are
        kept and reused, so calls from several threads are not allowed.
        """
        self.compiled = True
        return self

    def clear_decoder_cache(self) -> None:
        """Free the compiled decoders; the next call compiles again."""
        self.decoders.clear()

    def decoder_cache_nbytes(self) -> int:
        """Return the size of the key-value caches of all compiled decoders, in bytes."""
        total = 0
        for decoder in self.decoders.values():
            total += 2 * sum(keys.nbytes for keys in decoder.keys)
        return total

    def _decoder(self, condition_tokens: Tensor) -> IncrementalDecoder:
        """Return a decoder for a batch of condition tokens, a compiled one if ``compile_decoder`` was called."""
        if not self.compiled:
            return IncrementalDecoder(self.eval_model, len(condition_tokens))
        batch_size = 2 ** (len(condition_tokens) - 1).bit_length()
        # A decoder refers to the weights, which may have been moved, cast or replaced since it was compiled.
        key = (batch_size, condition_tokens.device, condition_tokens.dtype, id(self.eval_model.head.weight))
        if key not in self.decoders:
            self.decoders[key] = CompiledDecoder(self.eval_model, batch_size)
        return self.decoders[key]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled decoders of copies and pickles, because they refer to these weights."""
        return super().__getstate__() | {"decoders": {}}

    # ----------------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        """Apply gradient accumulation before the trainer counts its steps."""
        if stage == "fit" and self.optimizer_config.grad_accum_steps > 1:
            self.trainer.accumulate_grad_batches = self.optimizer_config.grad_accum_steps

    def configure_optimizers(self) -> Any:
        """Return AdamW, or Muon with AdamW, and its learning-rate schedule."""
        config = self.optimizer_config
        optimizer = make_optimizer(self, self.gpt.transformer.h, config)
        total_steps = self.trainer.estimated_stepping_batches
        scheduler = make_lr_scheduler(optimizer, config.schedule, config.warmup_steps, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients to ``optimizer.grad_clip``, or to the trainer's own value if that is 0."""
        self.clip_gradients(optimizer, self.optimizer_config.grad_clip or gradient_clip_val, gradient_clip_algorithm)

    def configure_model(self) -> None:
        """Shard the weights (FSDP2) if the strategy provides a device mesh."""
        if self.device_mesh is None or isinstance(self.gpt, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        networks: list[Any] = [self.gpt] if self.ema is None else [self.gpt, self.ema.module]
        for network in networks:
            # All weights outside the blocks form one group, because the head may share the weight of the embedding.
            # They are resharded after the forward pass, because in validation no backward pass would do it.
            for module in (*network.transformer.h, network):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that stops training after too many skipped steps."""
        return [StopOnNonFinite(self.guard)]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Skip the step if a loss or gradient is not finite."""
        self.guard.before_step([optimizer], self.global_step + 1)

    def on_fit_start(self) -> None:
        # A loaded model is in evaluation mode, and Lightning does not change that.
        self.train()
        if should_compile(self.hparams["compile"], self.device):
            self.gpt.compile()  # in place, which keeps the names of parameters

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then update the EMA."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.gpt)

    @property
    def has_encoders(self) -> bool:
        """Whether a VQ-GAN and a CLIP are attached."""
        return self._encoders is not None

    def encoders(self) -> tuple[VQGAN, Conditioner]:
        """Return the attached VQ-GAN and CLIP, on this module's device.

        Raises:
            RuntimeError: no models are attached.
        """
        if self._encoders is None:
            raise RuntimeError(
                "training on images needs the frozen models: call transformer.attach_encoders(vqgan, clip) first"
            )
        vqgan, clip = self._encoders
        return (vqgan, clip) if vqgan.device == self.device else (vqgan.to(self.device), clip.to(self.device))

    def prepare_batch(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return indices (B, T) and conditions (B, E) of a batch; encode its images if they are not cached."""
        if {"indices", "condition"} <= set(batch):
            return batch["indices"], batch["condition"]
        return self.encode_images(images_from_batch(batch))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) in [-1, 1] as indices (B, T) int64 and CLIP embeddings (B, E).

        Raises:
            RuntimeError: no encoders are attached.
            ValueError: the images are not square, or have another number of indices than ``num_tokens``.
        """
        vqgan, clip = self.encoders()
        if images.shape[-2] != images.shape[-1]:
            raise ValueError(f"images must be square, because generated images are square, got {tuple(images.shape)}")
        indices = rearrange(vqgan.encode(images), "b h w -> b (h w)")
        if indices.shape[1] != self.num_tokens:
            raise ValueError(
                f"num_tokens must be {indices.shape[1]} for images of {tuple(images.shape[-2:])}, got {self.num_tokens}"
            )
        return indices, clip.encode_image(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of Eq. 10, a scalar: the cross-entropy (Eq. 8), plus the weighted CLIP loss (Eq. 9).

        Args:
            batch: images, or indices and conditions, see the class.
            batch_idx: number of the batch in its epoch.
        """
        indices, clip_embedding = self.prepare_batch(batch)
        condition = add_condition_noise(clip_embedding, self.conditioning_config.noise_cosine)
        drop = None
        if self.conditioning_config.drop_prob > 0:
            drop = torch.rand(len(indices), device=indices.device) < self.conditioning_config.drop_prob
        loss, logits = self.gpt(indices, condition, drop, with_loss=True)
        terms = {"cross_entropy": loss}
        if self.hparams["loss_reduction"] == "sum":
            loss = loss * self.num_tokens
        config = self.clip_loss_config
        if config.weight > 0 and self.global_step % config.interval == 0:
            terms["clip_loss"] = self.clip_loss(logits, clip_embedding)
            loss = loss + config.weight * config.interval * terms["clip_loss"]  # Eq. 10
        self.guard.record(terms)
        for name, value in (terms | {"loss": loss}).items():
            self.log(f"train/{name}", value.detach())
        return loss

    def clip_loss(self, logits: Tensor, clip_embedding: Tensor) -> Tensor:
        """Return L_CLIP (Eq. 9) of the images decoded from ``logits``, on the first ``batch_fraction`` of the batch.

        Batches are shuffled, so the first samples are a random choice.

        Args:
            logits: (B, T, K).
            clip_embedding: embeddings of the condition, (B, E), unit norm.

        Returns:
            A scalar.
        """
        config = self.clip_loss_config
        vqgan, clip = self.encoders()
        size = max(round(config.batch_fraction * len(logits)), 1)
        codes = losses.differentiable_codes(logits[:size], vqgan.codebook, config.estimator)  # (size, T, D)
        z_q = rearrange(codes, "b (h w) d -> b d h w", h=math.isqrt(self.num_tokens))
        generated = clip.encode_image(vqgan.decode_latents(z_q))
        return losses.clip_loss(generated, clip_embedding[:size], config.type)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        indices, clip_embedding = self.prepare_batch(batch)
        num_real = num_real_samples(self._trainer, batch_idx, len(indices))
        # Under FSDP all ranks must compute the same number of times, even on batches that only repeat other samples.
        kept = num_real or len(indices)
        loss, _ = self.eval_model(indices[:kept], clip_embedding[:kept], with_loss=True)
        if num_real:
            self.averages.add({"val/cross_entropy": loss}, num_real)

    def on_validation_epoch_start(self) -> None:
        self.averages.reset()

    def on_validation_epoch_end(self) -> None:
        means = self.averages.compute()
        check_losses(means, self.global_step)
        self.log_dict(means)

    # -------------------------------------------------------------------------------------------------------- files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights(self, self.global_step)
        checkpoint["clipgen_model"] = model_folder.model_name_of(type(self))

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write a model folder with the EMA weights if there are any, else the trained ones; return its path.

        Args:
            path: folder to write.
            half: store the weights in half precision.
        """
        check_weights(self.eval_model)
        state = {f"gpt.{name}": tensor for name, tensor in self.eval_model.state_dict().items()}
        if self.gpt_config.tie_embeddings:
            del state[HEAD_WEIGHT]  # the same tensor as the token embedding
        return model_folder.save_folder(path, model_folder.model_name_of(type(self)), dict(self.hparams), state, half)

    @classmethod
    def from_state(cls, arguments: dict[str, Any], state: dict[str, Tensor]) -> Self:
        """Build the model, in evaluation mode, from its constructor's arguments and the weights of a file.

        ``build_verified`` checks both first.
        """
        # A model folder contains one set of weights, so no EMA is allocated for it.
        if not strip_prefix("ema.", state):
            arguments = arguments | {"optimizer": {**(arguments.get("optimizer") or {}), "ema_decay": 0.0}}
        model = cls(**arguments)
        if model.gpt_config.tie_embeddings and HEAD_WEIGHT not in state and TOKEN_EMBEDDING in state:
            state = state | {HEAD_WEIGHT: state[TOKEN_EMBEDDING]}
        model.load_state_dict(state)
        return model.eval()

    def init_from_gpt2(self, name: str | Path) -> ConditionalTransformer:
        """Initialize blocks, last norm and position embeddings from a GPT-2 that was trained on language.

        Position embeddings are copied, because previous-token heads depend on them: the first ``num_tokens``, or all
        if there are fewer. They are not copied with ``pos_embed_init="sincos_2d"``. Token embeddings are not copied,
        because words are not code indices.

        Args:
            name: name on the Hugging Face Hub (``"gpt2"``, ``"gpt2-medium"``), or a folder of ``save_pretrained``.

        Raises:
            ValueError: the model cannot be loaded, is not a GPT-2, or has another size.
        """
        network: Any = self.gpt.transformer
        state = gpt2.load_gpt2_weights(name, network.config)
        network.h.load_state_dict(strip_prefix("h.", state))
        network.ln_f.load_state_dict(strip_prefix("ln_f.", state))
        if self.gpt_config.pos_embed_init == "normal":
            positions = state["wpe.weight"][: self.num_tokens]
            network.wpe.weight.data[: len(positions)] = positions
        if self.ema is not None:
            self.eval_model.load_state_dict(self.gpt.state_dict())
        return self

    @classmethod
    def from_hfailab(cls, checkpoint: str | Path, n_head: int | None = None) -> Self:
        """Load ``gpt_*.pt`` of HFAiLab/clip-gen, in evaluation mode. No code in it is executed.

        Args:
            checkpoint: path of the file.
            n_head: number of attention heads, which cannot be inferred from the weights; None assumes a head dimension
                of 64, as in all models of that project.
        """
        with named_load_errors(checkpoint, cls.__name__):
            arguments, state = hfailab.convert_transformer(checkpoint, n_head)
        return build_verified(cls, arguments, state, checkpoint)
