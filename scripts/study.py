"""Compare the paper's method, a public recipe, ours and the baselines, at equal budget and with one tokenizer.

    python -m clipgen study shapes --output study/shapes
    python -m clipgen study cifar10 --data data/cifar10 --clip runs/cifar10-clip --vqgan RUN --output study/cifar10
    python -m clipgen study shapes --output study/shapes --rows gap       # ways to close the modality gap
    python -m clipgen study shapes --output study/shapes --rows search    # Tables 1 and 2 of the CLIP-guided search
    python -m clipgen study shapes --output study/shapes --rows biggan --generator biggan:FILE    # BigGAN-CLIP alone

All transformers are trained on one token cache for the same number of steps, and generate images for the same prompts.
Existing results are kept: an interrupted study resumes, and --seeds may be extended.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from recognize import load_or_train
from torch import Tensor, nn

from clipgen import VQGAN, FrozenCLIP, TextToImage
from clipgen.baselines.biggan_clip import BigGANCLIPParams, biggan_clip
from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.baselines.gan_files import load_gan
from clipgen.baselines.search import SearchResult, SearchRow, real_score, search, search_table
from clipgen.baselines.vqgan_clip import vqgan_clip
from clipgen.checkpoint.model_folder import fingerprint
from clipgen.cli import encode, train
from clipgen.cli.config import composed
from clipgen.cli.console import set_up_logging
from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.evaluation.features import Features, feature_extractor
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.report import table
from clipgen.evaluation.run import evaluate
from clipgen.evaluation.sources import GeneratedImages, GenerateFn, RealImages, make_generate_fn
from clipgen.files import atomic_write
from clipgen.generation.modality_gap import EmbeddingProjector, mean_shift
from clipgen.images import save_png, to_pil
from clipgen.sampling import SamplingParams
from clipgen.visualization import grid

# The learning rates of the papers suit a thousand times as many steps: each recipe has one that suits its optimizer.
PAPER = [
    "optimizer.name=adamw",
    "optimizer.learning_rate=1e-3",
    "optimizer.betas=[0.9,0.999]",
    "optimizer.weight_decay=0",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "pos_embed_init=normal",
    "conditioning.noise_cosine=1",
    "conditioning.drop_prob=0",
]
# Settings of stage 2, over those of the experiment. {tenth}: a tenth of the steps; {noise}: noise of the dataset.
RECIPES = {
    "paper": [*PAPER, "clip_loss.weight=0.2", "clip_loss.batch_fraction=0.25"],
    "no_clip_loss": PAPER,
    "hfailab": [
        *PAPER,
        "optimizer.betas=[0.9,0.95]",
        "optimizer.weight_decay=0.01",
        "optimizer.schedule=cosine",
        "optimizer.warmup_steps={tenth}",
        "dropout=0.1",
        "tie_embeddings=false",
        "lm_head_bias=true",
        "activation=gelu",
    ],
    "dropout": ["conditioning.drop_prob=0.1", "conditioning.noise_cosine=1"],
    "modern": ["conditioning.drop_prob=0.1", "conditioning.noise_cosine={noise}"],
    "class": ["conditioning.drop_prob=0.1"],
}
METRICS = ("accuracy", "shapes_all", "clip_score", "fid_0", "precision", "recall")
OPTIMIZED = ("vqgan_clip", "biggan_clip")
LABEL_HEIGHT = 22  # pixels above the grid of a row


@dataclass(frozen=True)
class Row:
    """A row of a table: a system, how it was trained, and how it generates.

    Args:
        name: name in the table.
        recipe: recipe of the training.
        system: "pipeline", "class", "search", "vqgan_clip" or "biggan_clip".
        shift: add the mean shift from text to image embeddings.
        nearest: project text embeddings onto the nearest image embeddings.
        params: sampling parameters.
    """

    name: str
    recipe: str | None = None
    system: str = "pipeline"
    shift: bool = False
    nearest: bool = False
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Setting:
    """Settings that depend on the dataset.

    Args:
        noise: conditioning.noise_cosine of the modern recipe.
        modern: sampling parameters of the modern recipe.
        guided: sampling parameters of the rows with guidance.
        prompts: the prompts.
    """

    noise: float
    modern: SamplingParams
    guided: SamplingParams
    prompts: list[str] = field(default_factory=list)


SHAPES = Setting(
    noise=0.95,
    modern=SamplingParams(top_p=0.8),
    guided=SamplingParams(guidance_scale=1.5),
    prompts=[str(attributes) for attributes in ALL_ATTRIBUTES],
)
CIFAR = Setting(noise=0.8, modern=SamplingParams(guidance_scale=3.0), guided=SamplingParams(guidance_scale=3.0))


def system_rows(setting: Setting) -> list[Row]:
    """Return the rows of CLIP-GEN's table."""
    return [
        Row("CLIP-GEN as in the paper", "paper"),
        Row("without the CLIP loss", "no_clip_loss"),
        Row("HFAiLab/clip-gen's recipe", "hfailab", params=SamplingParams(top_k=500, top_p=0.95)),
        Row("modern", "modern", params=setting.modern),
        Row("class-conditional transformer", "class", "class", params=setting.modern),
        Row("VQGAN-CLIP", None, "vqgan_clip"),
        Row("CLIP-guided search, best of 16", "class", "search", params=setting.modern),
    ]


def biggan_rows() -> list[Row]:
    """Return BigGAN-CLIP, whose generator is a file."""
    return [Row("BigGAN-CLIP", None, "biggan_clip")]


def gap_rows(setting: Setting) -> list[Row]:
    """Return ways to close the modality gap. All were trained with 10 % null conditions, which only guidance uses."""
    guided = setting.guided
    fading = replace(guided, guidance_power=-1.0)
    return [
        Row("none", "dropout"),
        Row("noise", "modern"),
        Row("mean shift", "dropout", shift=True),
        Row("nearest neighbors", "dropout", nearest=True),
        Row("guidance", "dropout", params=guided),
        Row("fading guidance", "dropout", params=fading),
        Row("noise, mean shift", "modern", shift=True),
        Row("noise, guidance", "modern", params=guided),
        Row("mean shift, nearest neighbors", "dropout", shift=True, nearest=True),
        Row("mean shift, guidance", "dropout", shift=True, params=guided),
        Row("noise, mean shift, guidance", "modern", shift=True, params=guided),
        Row("all", "modern", shift=True, nearest=True, params=guided),
    ]


def table_rows(name: str, setting: Setting) -> list[Row]:
    """Return the rows of a table of systems."""
    if name == "gap":
        return gap_rows(setting)
    return biggan_rows() if name == "biggan" else system_rows(setting)


class ClassifierFeatures(nn.Module):
    """The last hidden layer of the classifier of recognize.py, and its logits."""

    def __init__(self, classifier: nn.Sequential):
        super().__init__()
        self.body = classifier[:-1]
        self.head = classifier[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(images)
        return hidden, self.head(hidden)


class Study:
    """The frozen models, token cache and metrics of a dataset."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output: Path = args.output
        self.vqgan: str = args.vqgan or "shapes"
        self.clip = FrozenCLIP.from_spec(args.clip)
        self.experiment = [f"experiment={args.experiment}"]
        self.setting = SHAPES
        if args.experiment == "cifar10":
            names = json.loads((args.data / "classes.json").read_text())
            self.setting = replace(CIFAR, prompts=[f"a photo of a {name}" for name in names])
            self.experiment += [f"shards={args.data}", f"clip.model_name={args.clip}"]

    @cached_property
    def cache(self) -> Path:
        """Indices, CLIP embeddings and classes of all training images, computed if they do not exist."""
        root = self.output / "cache"
        options = ["data.train_size=12000", "data.val_size=1000"]
        if self.args.experiment == "cifar10":
            options = [f"data.class_names={self.args.data / 'classes.json'}"]
        config = composed(*self.experiment, *options, "data.labels=true", name="encode")
        config.vqgan, config.output = self.vqgan, str(root)
        encode.encode(config)
        return root

    @cached_property
    def metrics(self) -> ImageMetrics:
        """The rule-based evaluator or a classifier, CLIP score, FID."""
        if self.args.experiment == "shapes":
            return ImageMetrics(feature_extractor("clip:shapes"), [0], {"shapes": self.clip}, shapes=True)
        net: Any = load_or_train(self.args.classifier, self.args.data, 10, 32, 2000)
        features = Features(ClassifierFeatures(net), f"cifar10 classifier {fingerprint(net.state_dict())}")
        return ImageMetrics(features, [0], {"cifar10": self.clip}, classes=self.setting.prompts)

    @cached_property
    def reference(self) -> RealImages:
        """Real images."""
        name = "shapes" if self.args.experiment == "shapes" else str(self.args.data / "val-*.tar")
        return RealImages(name, 32, count=5000)

    def trained(self, recipe: str, seed: int) -> Path:
        """Return the run folder of a recipe, trained if it does not exist."""
        run = self.output / "runs" / f"{recipe}-{seed}"
        model = "label_transformer" if recipe == "class" else "transformer"
        if (run / model / "config.json").is_file():
            return run
        settings = [text.format(noise=self.setting.noise, tenth=self.args.steps // 10) for text in RECIPES[recipe]]
        config = composed(
            "stage=transformer",
            *self.experiment,
            "data=cached",
            f"seed={seed}",
            "logger=csv",
            f"trainer.max_steps={self.args.steps}",
            f"trainer.val_check_interval={self.args.steps}",
            "trainer.limit_val_batches=10",
            "image_logger.num_images=1",
            "image_logger.prompts=[]",
            *(f"model.{setting}" for setting in settings),
            *(["data.conditioning=class"] if recipe == "class" else []),
        )
        config.data.root, config.output = str(self.cache), str(run)
        train.train(config)
        return run

    def generate_fn(self, row: Row, seed: int) -> GenerateFn:
        """Return the function that generates the images of a row."""
        if row.system == "vqgan_clip":
            return self.optimize
        if row.system == "biggan_clip":
            return self.optimize_biggan
        assert row.recipe
        run = self.trained(row.recipe, seed)
        if row.system == "pipeline":
            pipe = TextToImage.load(run)
            pipe.projector = self.projector(row)
            return make_generate_fn(pipe, row.params)
        generator = ClassConditionalGenerator.load(run, row.params)
        if row.system == "class":
            return lambda prompts, seeds: generator.generate(self.classes_of(prompts), seeds)
        return lambda prompts, seeds: self.search_images(generator, prompts, seeds)

    def optimize(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return the images of VQGAN-CLIP."""
        targets = self.clip.encode_text(prompts)
        return vqgan_clip(VQGAN.load(self.vqgan), self.clip, targets, steps=100, cutouts=16, seed=seeds)

    def optimize_biggan(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return the images of BigGAN-CLIP."""
        generator: Any = load_gan(self.args.generator)
        params = BigGANCLIPParams(steps=100, cutouts=16)
        images = []
        for prompt, seed in zip(prompts, seeds):
            images.append(biggan_clip(generator, self.clip, self.clip.encode_text([prompt]), seed=seed, params=params))
        return torch.cat(images)

    def search_images(
        self, generator: ClassConditionalGenerator, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Tensor:
        """Return the best of 16 images of each prompt."""
        k = min(10, len(generator.class_names))
        images = [search(generator, self.clip, prompt, k, 16, seed).image for prompt, seed in zip(prompts, seeds)]
        return torch.stack(images)

    def classes_of(self, prompts: Sequence[str]) -> Tensor:
        """Return the class of each prompt."""
        return torch.tensor([self.setting.prompts.index(prompt) for prompt in prompts])

    def projector(self, row: Row) -> EmbeddingProjector | None:
        """Return what a row does to the embeddings of the prompts."""
        if not (row.shift or row.nearest):
            return None
        memory = TokenCacheDataset(self.cache / "train").embeddings()
        shift = mean_shift(memory, self.clip.encode_text(self.setting.prompts)) if row.shift else None
        return EmbeddingProjector(shift, memory if row.nearest else None)

    def folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a row's results and grid."""
        return self.output / "rows" / f"{row.name.replace(' ', '_').replace('/', '_')}-{seed}"

    def prompts_for(self, row: Row) -> list[str]:
        """Return evenly spaced prompts, one per image of a row."""
        prompts = self.setting.prompts
        count = self.args.num_optimized if row.system in OPTIMIZED else self.args.num_images
        step = max(len(prompts) // count, 1)
        return [prompts[i * step % len(prompts)] for i in range(count)]

    def result(self, row: Row, seed: int) -> dict[str, float]:
        """Return a row's results with one seed, evaluated if they do not exist."""
        folder = self.folder(row, seed)
        if not (folder / "metrics.json").is_file():
            prompts = self.prompts_for(row)
            generate = self.generate_fn(row, seed)
            identity = {"row": row.name, "steps": self.args.steps}
            evaluate(folder, GeneratedImages(generate, prompts, 10_000 * seed, identity), self.metrics, self.reference)
            shown = prompts[:: max(len(prompts) // 8, 1)][:8]
            images = generate(shown, list(range(len(shown))))
            save_png(grid(to_pil(images), columns=8, captions=shown, cell=96), folder / "grid.png")
        return json.loads((folder / "metrics.json").read_text())["metrics"]


def mean_and_std(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean over seeds of the metrics in ``METRICS`` and, with several seeds, the standard deviation."""
    summary = {}
    for name in results[0]:
        if name.startswith(METRICS):
            values = torch.tensor([result[name] for result in results], dtype=torch.float64)
            summary[name] = values.mean().item()
            if len(values) > 1:
                summary[f"{name}_std"] = values.std().item()
    return summary


def combined_grid(study: Study, rows: Sequence[Row]) -> Image.Image:
    """Return the grids of all rows, one below the other."""
    grids = [Image.open(study.folder(row, study.args.seeds[0]) / "grid.png") for row in rows]
    height = sum(image.height + LABEL_HEIGHT for image in grids)
    combined = Image.new("RGB", (grids[0].width, height), "white")
    top = 0
    for row, image in zip(rows, grids):
        ImageDraw.Draw(combined).text((6, top + 4), row.name, "black", ImageFont.load_default(size=14))
        combined.paste(image, (0, top + LABEL_HEIGHT))
        top += image.height + LABEL_HEIGHT
    return combined


# -------------------------------------------------------------------------------------------------------------- search


def search_tables(study: Study) -> str:
    """Return Tables 1 and 2 of the CLIP-guided search, with the FID of all images that were generated for a k."""
    generator = ClassConditionalGenerator.load(study.trained("class", study.args.seeds[0]), study.setting.modern)
    prompts = study.setting.prompts[:: max(len(study.setting.prompts) // 20, 1)]
    images: dict[int, list[Tensor]] = {}

    def keep_images(k: int, seed: int, prompt_number: int, result: SearchResult) -> None:
        assert result.images is not None
        images.setdefault(k, []).append(result.images)

    rows = search_table(
        generator,
        study.clip,
        prompts,
        real_images_score(study),
        seeds=study.args.seeds,
        return_images=True,
        callback=keep_images,
    )
    return table([(f"k = {row.k}", search_results(study, row, torch.cat(images[row.k]))) for row in rows])


def search_results(study: Study, row: SearchRow, images: Tensor) -> dict[str, float]:
    """Return the results of a k."""
    source = GeneratedImages(lambda captions, numbers: images[numbers], [""] * len(images), 0, {"k": row.k})
    folder = study.output / "search" / str(row.k)
    metrics = evaluate(folder, source, study.metrics.for_reference(), study.reference)
    assert metrics is not None
    mean, std = row.best_mean_std
    results = {"best CLIP score_mean": mean, "best CLIP score_std": std, "fid_0": metrics["fid_0"]}
    if row.needed_mean_std:
        results["images needed_mean"], results["images needed_std"] = row.needed_mean_std
    return results


def real_images_score(study: Study) -> float:
    """Return the mean CLIP score of real images and their captions."""
    if study.args.experiment == "shapes":
        dataset = ShapesDataset(1000, seed=5)
        captions = [str(attributes) for attributes in dataset.attributes]
        return real_score(study.clip, dataset.render(range(1000)), captions)
    cache = TokenCacheDataset(study.cache / "val")
    labels = torch.cat([torch.from_numpy(shard["label"].astype("int64")) for shard in cache.shards])
    text = study.clip.encode_text(study.setting.prompts)[labels]
    return (cache.embeddings(len(cache)) * text).sum(dim=1).mean().item()


# ------------------------------------------------------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=["shapes", "cifar10"], help="dataset and sizes of the models")
    p.add_argument("--output", type=Path, required=True, help="folder of the study")
    rows = ["systems", "gap", "search", "biggan"]
    p.add_argument("--rows", choices=rows, default="systems", help="table (default: systems)")
    p.add_argument("--generator", help="biggan:FILE, for --rows biggan")
    p.add_argument("--data", type=Path, help="shards of make_shards.py, for cifar10")
    p.add_argument("--clip", default="shapes", help="folder of train_clip.py, for cifar10")
    p.add_argument("--vqgan", help="run of stage 1 (default: the bundled one for shapes)")
    p.add_argument(
        "--classifier",
        type=Path,
        default=Path("runs/classifier.pt"),
        help="classifier file of recognize.py, for cifar10 (default: %(default)s)",
    )
    p.add_argument("--steps", type=int, default=600, help="steps of every transformer (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings (default: 0 1 2)")
    p.add_argument("--num-images", type=int, default=576, help="images per row and seed (default: %(default)s)")
    p.add_argument(
        "--num-optimized",
        type=int,
        default=48,
        help="images per seed of VQGAN-CLIP and BigGAN-CLIP (default: %(default)s)",
    )
    return p


def main() -> None:
    """Compute a table, row by row, and the grid of its images."""
    args = parser().parse_args()
    set_up_logging()
    if args.rows == "biggan" and not args.generator:
        raise SystemExit("--rows biggan needs --generator biggan:FILE; `python -m clipgen train_generator` makes one")
    study = Study(args)
    if args.rows == "search":
        return write(args.output / "search.md", search_tables(study))
    rows = table_rows(args.rows, study.setting)
    results = []
    for row in rows:
        results.append((row.name, mean_and_std([study.result(row, seed) for seed in args.seeds])))
        write(args.output / f"{args.rows}.md", table(results))
    save_png(combined_grid(study, rows), args.output / f"{args.rows}.png")


def write(path: Path, text: str) -> None:
    """Write the table so far, and print it."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
