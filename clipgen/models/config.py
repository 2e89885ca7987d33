"""Configuration of the models: one dataclass per part, whose fields are the keys of the YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

RECONSTRUCTION_LOSSES = ("l1", "l2")
GAN_LOSSES = ("hinge", "log", "minimax")
LOSS_REDUCTIONS = ("mean", "sum")
CLIP_LOSS_TYPES = ("log", "cosine")
CLIP_LOSS_ESTIMATORS = ("straight_through", "gumbel", "expected")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
POSITION_INITS = ("normal", "sincos_2d")
WEIGHT_INITS = ("gpt2", "torch")

Config = TypeVar("Config")


def training_only(default: Any) -> Any:
    """Declare a field that changes how a model is trained, but not what its weights compute."""
    return field(default=default, metadata={"training_only": True})


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the encoder and the decoder of a VQ-GAN; the names are taming-transformers'.

    Args:
        ch: channels at the highest resolution.
        ch_mult: multiplier of the channels at each resolution, from the highest to the lowest.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention, counted down from ``resolution``.
        resolution: nominal height of the images in pixels; any size divisible by f is accepted.
        z_channels: channels of the encoder's output.
        patch_size: fold patches of this many pixels into channels before the first convolution (1: VQ-GAN).
            2 or 4 avoid the costly layers at full resolution when training on a CPU.
        mid_attention: apply self-attention at the lowest resolution, as VQ-GAN does.
        resamp_with_conv: change the resolution by convolutions, as all published VQ-GANs do.
        encoder_kernel_size: 3 (VQ-GAN), or 1 to restrict the receptive field to (almost) one patch.
        norm_eps: epsilon of the group norms (HFAiLab/clip-gen: 1e-5).
        dropout: dropout in the residual blocks.
        grad_checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    section: ClassVar[str] = "autoencoder"

    ch: int = 128
    ch_mult: Sequence[int] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = (16,)
    resolution: int = 256
    z_channels: int = 256
    patch_size: int = 1
    mid_attention: bool = True
    resamp_with_conv: bool = True
    encoder_kernel_size: int = 3
    norm_eps: float = 1e-6
    dropout: float = training_only(0.0)
    grad_checkpointing: bool = training_only(False)

    def __post_init__(self) -> None:
        for name in ("ch", "num_res_blocks", "resolution", "z_channels", "patch_size"):
            require_at_least(self, name, 1)
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"autoencoder.ch_mult must be a list of numbers of at least 1, got {list(self.ch_mult)}")
        require_choice(self, "encoder_kernel_size", (1, 3))

    @property
    def downsampling(self) -> int:
        """The factor f between the sides of an image and of its grid of indices."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class QuantizerConfig:
    """Vector quantization of the latents.

    Args:
        type: name of the quantizer, a key of ``quantizers.QUANTIZERS``.
        codebook_size: K, number of codes.
        codebook_dim: D, dimension of a code.
        fsq_levels: levels per dimension (FSQ only); their product must be K and their number D.
        dead_code_reset_after: number of training batches without use after which a code is reset to a latent with a
            large quantization error; 0 disables resets (the paper).
        codebook_ema_decay: 0 trains the codes by the gradient of the codebook loss (the paper); above 0, codes are an
            exponential moving average of their latents.
        kmeans_iters: iterations of k-means that initialize the codes from the first batches; 0 disables it.
    """

    section: ClassVar[str] = "quantizer"

    type: str = "euclidean"
    codebook_size: int = 16384
    codebook_dim: int = 256
    fsq_levels: Sequence[int] | None = None
    dead_code_reset_after: int = training_only(0)
    codebook_ema_decay: float = training_only(0.0)
    kmeans_iters: int = training_only(0)

    def __post_init__(self) -> None:
        require_at_least(self, "codebook_size", 2)
        require_at_least(self, "codebook_dim", 1)
        require_in_unit_interval(self, "codebook_ema_decay")

    def refuse_codebook_updates(self) -> None:
        """Raise ValueError if an option is set that only a learned codebook (VectorQuantizer) has."""
        options = ("dead_code_reset_after", "codebook_ema_decay", "kmeans_iters")
        used = [f"{name}={getattr(self, name)}" for name in options if getattr(self, name)]
        if used:
            raise ValueError(
                f"{', '.join(options)} apply only to quantizers 'euclidean' and 'cosine', "
                f"not to {self.type!r}; got {', '.join(used)}"
            )

    def require_sizes(self, codebook_size: int, codebook_dim: int) -> None:
        """Raise ValueError unless K and D are those that the quantizer implies."""
        if (self.codebook_size, self.codebook_dim) != (codebook_size, codebook_dim):
            levels = f" with levels {list(self.fsq_levels)}" if self.fsq_levels else ""
            raise ValueError(
                f"codebook_size and codebook_dim must be {codebook_size} and {codebook_dim} for quantizer "
                f"{self.type!r}{levels}, got {self.codebook_size} and {self.codebook_dim}"
            )


@dataclass(frozen=True)
class LossConfig:
    """Losses of the autoencoder, without the adversarial one.

    Args:
        reduction: ``"mean"`` over elements; or ``"sum"`` over the elements of an image, as Eq. 4 prints, for the
            reconstruction, codebook and commitment losses. Against the reconstruction, the two others weigh 3 times as
            much in the mean; against LPIPS and the adversarial loss, all three weigh much more in the sum.
        reconstruction: pixel loss, ``"l1"`` (VQ-GAN's code) or ``"l2"`` (Eq. 4).
        codebook_weight: weight of the codebook loss ||sg[z] - z_q||^2 (Eq. 4).
        commitment_weight: weight of the commitment loss ||z - sg[z_q]||^2 (Eq. 4), VQ-VAE's beta. taming-transformers
            applied beta to the codebook loss: to continue training its checkpoints, use codebook_weight=0.25 and
            commitment_weight=1.
        entropy_weight: weight of the entropy loss (LFQ only).
        kl_weight: weight of the KL loss (Gumbel only).
        perceptual_weight: weight of LPIPS. 0 disables it, and then no VGG-16 weights are needed.
        vgg_weights: file of torchvision's VGG-16 weights; None uses torchvision's cache or downloads them.
        clip_perceptual_weight: weight of the distance in the feature maps of a CLIP's image encoder, see
            ``FrozenCLIP.perceptual_distance``. A small CLIP costs much less than VGG-16. 0 disables it.
        clip_perceptual_model: that CLIP, ``"MODEL"`` or ``"MODEL:TAG"`` as in ``FrozenCLIP.from_spec``.
    """

    section: ClassVar[str] = "loss"

    reduction: str = "mean"
    reconstruction: str = "l1"
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    kl_weight: float = 1e-8
    perceptual_weight: float = 1.0
    vgg_weights: str | None = None
    clip_perceptual_weight: float = 0.0
    clip_perceptual_model: str | None = None

    def __post_init__(self) -> None:
        require_choice(self, "reduction", LOSS_REDUCTIONS)
        require_choice(self, "reconstruction", RECONSTRUCTION_LOSSES)
        if self.clip_perceptual_weight > 0 and not self.clip_perceptual_model:
            raise ValueError("loss.clip_perceptual_weight above 0 needs loss.clip_perceptual_model, a CLIP; got none")

    def weight_of(self, loss: str) -> float:
        """Return the weight of a quantizer's loss, e.g. of ``"codebook_loss"``."""
        weight: float = getattr(self, loss.replace("_loss", "_weight"))
        return weight


@dataclass(frozen=True)
class GANConfig:
    """Discriminator and adversarial loss (Eq. 5).

    Args:
        weight: weight of the adversarial loss. 0 trains without a discriminator.
        start_step: step at which adversarial training begins (25,000 in the paper). Until then the discriminator is
            not trained and the adversarial loss is not applied.
        disc_only_steps: number of steps after ``start_step`` that train the discriminator only.
        channels: channels of the discriminator's first layer.
        num_layers: strided layers of the discriminator; 3 sees patches of 70 x 70 pixels (the paper).
        loss: ``"hinge"``; ``"log"`` (Eq. 5, halved, and non-saturating for the generator); or ``"minimax"`` (Eq. 5 as
            printed, for both networks).
        adaptive: multiply the weight by VQ-GAN's adaptive weight, which CLIP-GEN does not print.
        adaptive_weight_max: upper bound of the adaptive weight (VQ-GAN, Eq. 7).
        lecam_weight: weight of the LeCam regularization of the discriminator; 0 disables it.
    """

    section: ClassVar[str] = "gan"

    weight: float = 0.8
    start_step: int = 25_000
    disc_only_steps: int = 0
    channels: int = 64
    num_layers: int = 3
    loss: str = "hinge"
    adaptive: bool = True
    adaptive_weight_max: float = 1e4
    lecam_weight: float = 0.0

    def __post_init__(self) -> None:
        require_choice(self, "loss", GAN_LOSSES)
        require_at_least(self, "num_layers", 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule; the defaults are stage 1's (Adam, generator and discriminator alike).

    Args:
        learning_rate: peak learning rate.
        betas: Adam's coefficients.
        schedule: ``"constant"``, or ``"cosine"`` to zero at the end of training.
        warmup_steps: steps of linear warm-up.
        grad_clip: maximum gradient norm; 0 disables clipping.
        grad_accum_steps: number of batches per optimizer step.
        ema_decay: decay of the exponential moving average (EMA) of the weights, which evaluation and saved models
            use; 0 disables it.
        max_skipped_steps: number of consecutive steps with non-finite losses or gradients that stops the training;
            each of them is skipped.
    """

    section: ClassVar[str] = "optimizer"

    learning_rate: float = 4.5e-6
    betas: Sequence[float] = (0.5, 0.9)
    schedule: str = "constant"
    warmup_steps: int = 0
    grad_clip: float = 0.0
    grad_accum_steps: int = 1
    ema_decay: float = 0.0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        require_choice(self, "schedule", SCHEDULES)
        require_at_least(self, "grad_accum_steps", 1)
        require_at_least(self, "max_skipped_steps", 1)
        require_in_unit_interval(self, "ema_decay")


@dataclass(frozen=True)
class TransformerOptimizerConfig(OptimizerConfig):
    """Optimizer of stage 2.

    Args:
        name: ``"adamw"``, or ``"muon"`` for the matrices of the blocks and AdamW for the rest.
        weight_decay: weight decay of the matrices; 0 makes AdamW the paper's Adam.
        decay_embeddings: also apply the weight decay to the token and position embeddings.
    """

    name: str = "adamw"
    learning_rate: float = 1e-5
    betas: Sequence[float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "name", OPTIMIZERS)


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the conditional GPT-2; the names are GPT-2's where it has one.

    Args:
        n_layer: number of blocks.
        n_head: attention heads per block.
        n_embd: width.
        codebook_size: K, number of codes.
        num_tokens: T, code indices per image.
        clip_dim: E, dimension of the CLIP embedding.
        dropout: dropout on embeddings, attention and residuals.
        mlp_dropout: dropout after the activation of the MLPs, as in ``torch.nn.TransformerEncoderLayer``.
        tie_embeddings: share the output matrix with the token embedding, as GPT-2 does.
        lm_head_bias: add a bias to the logits.
        activation: name of the activation in transformers. The default is GPT-2's, as one kernel ("gelu_new" is eight).
        pos_embed_init: ``"normal"`` (GPT-2), or ``"sincos_2d"`` to initialize the learned position embeddings with
            2-D sinusoids of row and column, so that attention to the token above works from the start.
        weight_init: initialization: ``"gpt2"``, normal with deviation 0.02; or ``"torch"``, that of torch.nn's modules
            and zero positions, as in HFAiLab/clip-gen.
        scale_condition: multiply the CLIP embedding by the square root of its dimension before the projection, so that
            its elements have unit variance. The paper mentions only the projection.
        grad_checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    section: ClassVar[str] = ""

    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 1024
    codebook_size: int = 16384
    num_tokens: int = 256
    clip_dim: int = 512
    dropout: float = training_only(0.0)
    mlp_dropout: float = training_only(0.0)
    tie_embeddings: bool = True
    lm_head_bias: bool = False
    activation: str = "gelu_pytorch_tanh"
    pos_embed_init: str = training_only("normal")
    weight_init: str = training_only("gpt2")
    scale_condition: bool = True
    grad_checkpointing: bool = training_only(False)

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "num_tokens", "clip_dim"):
            require_at_least(self, name, 1)
        require_choice(self, "pos_embed_init", POSITION_INITS)
        require_choice(self, "weight_init", WEIGHT_INITS)
        require_in_unit_interval(self, "mlp_dropout")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}")


@dataclass(frozen=True)
class ConditioningConfig:
    """Dropout and noise of the condition in training.

    Args:
        drop_prob: probability of replacing the condition by a learned null condition, which classifier-free guidance
            requires (0.1 is usual; the paper has none).
        noise_cosine: expected cosine between the clean embedding and the noisy one that training uses; 1 adds no noise
            (the paper).
    """

    section: ClassVar[str] = "conditioning"

    drop_prob: float = 0.0
    noise_cosine: float = 1.0

    def __post_init__(self) -> None:
        require_in_unit_interval(self, "drop_prob")
        if not 0 < self.noise_cosine <= 1:
            raise ValueError(f"conditioning.noise_cosine must be in (0, 1], got {self.noise_cosine}")


@dataclass(frozen=True)
class ClipLossConfig:
    """The CLIP loss of stage 2 (Eq. 9, 10).

    Args:
        weight: lambda of Eq. 10 (0.2 in the paper); 0 disables the loss, and then decoder and CLIP are not needed.
        estimator: gradient estimator of the decoded codes, see ``losses.differentiable_codes``.
        type: ``"log"`` (Eq. 9) or ``"cosine"``, see ``losses.clip_loss``.
        interval: compute the loss every N optimizer steps, weighted by N (lazy regularization, arXiv:1912.04958,
            Sec. 3.1).
        batch_fraction: fraction of the batch that the loss is computed on, at least one sample.
    """

    section: ClassVar[str] = "clip_loss"

    weight: float = 0.0
    estimator: str = "straight_through"
    type: str = "log"
    interval: int = 1
    batch_fraction: float = 1.0

    def __post_init__(self) -> None:
        require_choice(self, "estimator", CLIP_LOSS_ESTIMATORS)
        require_choice(self, "type", CLIP_LOSS_TYPES)
        require_at_least(self, "interval", 1)
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(f"clip_loss.batch_fraction must be in (0, 1], got {self.batch_fraction}")


def as_config(config_class: type[Config], values: Config | Mapping[str, Any] | None) -> Config:
    """Return a configuration from itself, from a mapping of its fields, or (None) with the defaults.

    Raises:
        TypeError: the mapping has a key that is not a field.
    """
    if isinstance(values, config_class):
        return values
    names = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    values = dict(values or {})  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise TypeError(f"{config_class.__name__} has no field {key!r}; its fields are {', '.join(names)}")
    return config_class(**values)


def to_plain(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration as plain Python values, for checkpoints and JSON."""
    values: dict[str, Any] = to_plain_types(asdict(config))
    return values


def to_plain_types(value: Any) -> Any:
    """Convert NumPy, OmegaConf and pathlib values to numbers, strings, lists and dicts."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: to_plain_types(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain_types(item) for item in value]
    return value


def dotted_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys, as in "gan.weight", and the values of nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def model_settings(config: Any) -> dict[str, Any]:
    """Return the fields that determine what given weights compute, i.e. all but the training-only ones."""
    values = to_plain(config)
    return {f.name: values[f.name] for f in fields(config) if not is_training_only(f)}


def is_training_only(config_field: Field[Any]) -> bool:
    """Return whether a field was declared by ``training_only``."""
    return bool(config_field.metadata.get("training_only", False))


def key_of(config: Any, name: str) -> str:
    """Return the key of a field below ``model``, as in "gan.weight"."""
    return f"{config.section}.{name}" if config.section else name


def require_choice(config: Any, name: str, choices: Sequence[Any]) -> None:
    """Raise ValueError unless a field has one of the given values."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{key_of(config, name)} must be one of {', '.join(map(str, choices))}, got {value!r}")


def require_at_least(config: Any, name: str, minimum: int) -> None:
    """Raise ValueError unless a field has at least the given value."""
    value = getattr(config, name)
    if not value >= minimum:
        raise ValueError(f"{key_of(config, name)} must be at least {minimum}, got {value}")


def require_in_unit_interval(config: Any, name: str) -> None:
    """Raise ValueError unless a field lies in [0, 1)."""
    value = getattr(config, name)
    if not 0 <= value < 1:
        raise ValueError(f"{key_of(config, name)} must be in [0, 1), got {value}")
