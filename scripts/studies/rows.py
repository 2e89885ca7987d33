"""The rows of the study's tables: systems, how they are trained, and how they generate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from clipgen.sampling_params import SamplingParams

# The papers' optimizer, initialization and condition. The learning rate and the schedule are tuned.
PAPER = (
    "optimizer.name=adamw",
    "optimizer.betas=[0.9,0.999]",
    "optimizer.weight_decay=0",
    "pos_embed_init=normal",
    "conditioning.noise_cosine=1",
    "conditioning.drop_prob=0",
)
# HFAiLab/clip-gen's stage 2, as in configs/recipe/hfailab_transformer.yaml.
HFAILAB = (
    *PAPER,
    "optimizer.betas=[0.9,0.95]",
    "optimizer.weight_decay=0.01",
    "optimizer.decay_embeddings=false",
    "dropout=0.1",
    "mlp_dropout=0.1",
    "tie_embeddings=false",
    "lm_head_bias=true",
    "activation=gelu",
    "weight_init=torch",
    "scale_condition=false",
)
# Muon as in the experiments' own recipes.
MUON = ("optimizer.name=muon", "optimizer.betas=[0.9,0.95]", "optimizer.weight_decay=0.05")
ADAMW = ("optimizer.name=adamw", "optimizer.betas=[0.9,0.95]", "optimizer.weight_decay=0.05")
GUIDABLE = ("conditioning.drop_prob=0.1", "conditioning.noise_cosine=1")
BATCH_SIZE = 32
# HFAiLab's learning rate is 5e-4 / 256 times the batch size; a tenth of its training is warm-up, then cosine.
HFAILAB_RATE = 5e-4 / 256 * BATCH_SIZE


@dataclass(frozen=True)
class Recipe:
    """Training of a transformer.

    Args:
        settings: keys below ``model`` with their values, over those of the experiment. {noise}: the dataset's noise.
        rate: learning rate; None uses the tuned one.
        schedule: schedule; None uses the tuned one. "cosine" has a tenth of the steps as warm-up, "constant" none.
        reference: the recipe whose tuned rate and schedule are used; None uses its own.
    """

    settings: tuple[str, ...]
    rate: float | None = None
    schedule: str | None = None
    reference: str | None = None


RECIPES = {
    "paper": Recipe((*PAPER, "clip_loss.weight=0.2")),
    "no_clip_loss": Recipe(PAPER),
    "paper_muon": Recipe((*PAPER, *MUON)),
    "hfailab": Recipe(HFAILAB),
    "hfailab_rate": Recipe(HFAILAB, rate=HFAILAB_RATE, schedule="cosine"),
    "modern": Recipe((*MUON, "conditioning.drop_prob=0.1", "conditioning.noise_cosine={noise}")),
    "modern_adamw": Recipe((*ADAMW, "conditioning.drop_prob=0.1", "conditioning.noise_cosine={noise}")),
    "dropout": Recipe((*MUON, *GUIDABLE)),
    "class": Recipe((*MUON, *GUIDABLE)),
}

# The small grids on which every row is tuned.
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
SCHEDULES = ("constant", "cosine")
TOP_PS = (0.8, 0.9, 1.0)
GUIDANCE_SCALES = (1.0, 1.5, 3.0)

# The curve of the CLIP loss.
CURVE_WEIGHTS = (0.2, 1.0, 3.0, 10.0, 30.0)
CURVE_FORMS = (
    ("log", "straight_through"),
    ("cosine", "straight_through"),
    ("log", "gumbel"),
    ("log", "expected"),
)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: name in the table.
        recipe: key of ``RECIPES``; None for systems that are not trained.
        system: "pipeline", "class", "search", "vqgan_clip", "biggan_clip" or "real".
        shift: add the mean shift from text to image embeddings.
        nearest: project text embeddings onto the nearest image embeddings.
        params: sampling parameters; None uses tuned ones.
        best_of: candidates of a prompt, of which CLIP keeps the ``keep`` best.
        keep: number of images kept.
    """

    name: str
    recipe: str | None = None
    system: str = "pipeline"
    shift: bool = False
    nearest: bool = False
    params: SamplingParams | None = None
    best_of: int = 1
    keep: int = 1

    @property
    def is_small(self) -> bool:
        """True if the row has fewer images than the others, because each is optimized."""
        return self.system in ("vqgan_clip", "biggan_clip")


REAL = Row("real images", None, "real")
# Only with --generator.
BIGGAN_CLIP = Row("BigGAN-CLIP", None, "biggan_clip")


@dataclass(frozen=True)
class Setting:
    """Settings that depend on the dataset.

    Args:
        noise: conditioning.noise_cosine of the modern recipe.
        guided: sampling parameters of the rows with guidance.
        tuning_prompts: prompts of the tuning split.
        prompts: prompts of the reported split.
    """

    noise: float
    guided: SamplingParams
    tuning_prompts: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


SHAPES = Setting(noise=0.95, guided=SamplingParams(guidance_scale=1.5))
CIFAR = Setting(noise=0.8, guided=SamplingParams(guidance_scale=3.0))


def system_rows() -> list[Row]:
    """Return the rows of CLIP-GEN's table."""
    published = SamplingParams()
    hfailab = SamplingParams(top_k=500, top_p=0.95)
    return [
        REAL,
        Row("CLIP-GEN as in the paper", "paper"),
        Row("the same, sampling as in the paper", "paper", params=published),
        Row("without the CLIP loss", "no_clip_loss"),
        Row("without the CLIP loss, Muon", "paper_muon"),
        Row("HFAiLab/clip-gen's recipe, its rate and sampling", "hfailab_rate", params=hfailab),
        Row("the same, 8 best of 64", "hfailab_rate", params=hfailab, best_of=64, keep=8),
        Row("HFAiLab/clip-gen's recipe", "hfailab"),
        Row("modern", "modern"),
        Row("modern, AdamW", "modern_adamw"),
        Row("class-conditional transformer", "class", "class"),
        Row("VQGAN-CLIP", None, "vqgan_clip"),
        Row("CLIP-guided search, best of 16", "class", "search"),
    ]


def gap_rows(setting: Setting) -> list[Row]:
    """Return ways to close the modality gap. All were trained with 10 % null conditions, which only guidance uses."""
    plain = SamplingParams()
    guided = setting.guided
    fading = replace(guided, guidance_power=-1.0)
    return [
        REAL,
        Row("none", "dropout", params=plain),
        Row("noise", "modern", params=plain),
        Row("mean shift", "dropout", shift=True, params=plain),
        Row("nearest neighbors", "dropout", nearest=True, params=plain),
        Row("guidance", "dropout", params=guided),
        Row("fading guidance", "dropout", params=fading),
        Row("noise, mean shift", "modern", shift=True, params=plain),
        Row("noise, guidance", "modern", params=guided),
        Row("mean shift, nearest neighbors", "dropout", shift=True, nearest=True, params=plain),
        Row("mean shift, guidance", "dropout", shift=True, params=guided),
        Row("noise, mean shift, guidance", "modern", shift=True, params=guided),
        Row("all", "modern", shift=True, nearest=True, params=guided),
    ]


def curve_rows(weights: Sequence[float] = CURVE_WEIGHTS) -> list[Row]:
    """Return the rows of the curve over lambda: no CLIP loss, then each form at each weight; sampled as printed."""
    rows = [REAL, Row("lambda = 0", "no_clip_loss", params=SamplingParams())]
    for (form, estimator), weight in itertools.product(CURVE_FORMS, weights):
        name = f"{curve_name(form, estimator)}: lambda = {weight:g}"
        rows.append(Row(name, curve_recipe(form, estimator, weight), params=SamplingParams()))
    return rows


def curve_name(form: str, estimator: str) -> str:
    """Return the name of a form of the CLIP loss."""
    return f"{form}, {estimator.replace('_', '-')}"


def curve_recipe(form: str, estimator: str, weight: float) -> str:
    """Add the recipe of a CLIP loss to ``RECIPES``, with the rate and schedule of the one without; return its key."""
    key = f"clip_{form}_{estimator}_{weight:g}"
    loss = (f"clip_loss.type={form}", f"clip_loss.estimator={estimator}", f"clip_loss.weight={weight:g}")
    RECIPES[key] = Recipe((*PAPER, *loss), reference="no_clip_loss")
    return key
