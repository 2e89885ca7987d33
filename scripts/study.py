"""One table for all: the paper's method, the public recipe, ours, and the baselines, at equal budget on one tokenizer.

    python scripts/study.py shapes --output study/shapes
    python scripts/study.py cifar10 --data data/cifar10 --clip runs/cifar10-clip --vqgan outputs/vqgan/cifar10 --output study/cifar10
    python scripts/study.py shapes --output study/shapes --rows gap       # ways over the modality gap, alone and together
    python scripts/study.py shapes --output study/shapes --rows search    # Tables 1 and 2 of the CLIP-guided search

All transformers learn from one encoded cache, the same number of steps, and draw the same sentences. What is there
already stays: a killed study goes on, and --seeds may grow.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from recognise import load_or_train
from torch import Tensor

from clipgen import VQGAN, FrozenCLIP, TextToImage
from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.baselines.search import KS, real_score, search, search_table
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
from clipgen.evaluation.sources import Draw, GeneratedImages, RealImages, drawing
from clipgen.files import atomic_write
from clipgen.generation.modality_gap import EmbeddingProjector, mean_shift
from clipgen.images import grid, save_png, to_pil

# The papers' rates belong to budgets a thousand times ours: here each recipe has the one that suits its optimizer.
PAPER = [
    "optimizer=adamw",
    "learning_rate=1e-3",
    "betas=[0.9,0.999]",
    "weight_decay=0",
    "schedule=constant",
    "warmup_steps=0",
    "grid_positions=false",
    "cond_noise_cosine=1",
    "cond_drop_prob=0",
]
RECIPES = {  # of stage 2, over the experiment's own; tenth: of all steps
    "paper": [*PAPER, "clip_loss_weight=0.2", "clip_loss_batch_fraction=0.25"],
    "no_clip_loss": PAPER,
    "hfailab": [
        *PAPER,
        "betas=[0.9,0.95]",
        "weight_decay=0.01",
        "schedule=cosine",
        "warmup_steps={tenth}",
        "dropout=0.1",
        "tie_embeddings=false",
        "lm_head_bias=true",
        "activation=gelu",
    ],
    "dropout": ["cond_drop_prob=0.1", "cond_noise_cosine=1"],
    "modern": ["cond_drop_prob=0.1", "cond_noise_cosine={noise}"],
    "label": ["cond_drop_prob=0.1"],
}

SHOWN = ("accuracy", "judge_all", "clip_score", "fid_0", "precision", "recall")


@dataclass(frozen=True)
class Row:
    """A system: which training it draws from, and how."""

    name: str
    recipe: str | None = None
    system: str = "pipeline"  # or label, vqgan_clip, search
    shift: bool = False
    nearest: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a data set asks for."""

    sentences: list[str]
    noise: float  # cond_noise_cosine of the modern recipe
    ours: dict[str, Any]  # sampling of the modern recipe
    guidance: dict[str, Any]


SHAPES = Setting([str(a) for a in ALL_ATTRIBUTES], 0.95, {"top_p": 0.8}, {"guidance_scale": 1.5})
CIFAR = Setting([], 0.8, {"guidance_scale": 3.0}, {"guidance_scale": 3.0})


def systems(s: Setting) -> list[Row]:
    """CLIP-GEN's table."""
    return [
        Row("CLIP-GEN as in the paper", "paper"),
        Row("without the CLIP loss", "no_clip_loss"),
        Row("HFAiLab/clip-gen's recipe", "hfailab", sampling={"top_k": 500, "top_p": 0.95}),
        Row("modern", "modern", sampling=s.ours),
        Row("label-conditioned transformer", "label", "label", sampling=s.ours),
        Row("VQGAN-CLIP", None, "vqgan_clip"),
        Row("CLIP-guided search, best of 16", "label", "search", sampling=s.ours),
    ]


def gap(s: Setting) -> list[Row]:
    """Ways over the modality gap. All were trained with 10 % null conditions; unguided, those change nothing."""
    power = s.guidance | {"guidance_power": -1.0}
    return [
        Row("none", "dropout"),
        Row("noise", "modern"),
        Row("mean shift", "dropout", shift=True),
        Row("nearest neighbors", "dropout", nearest=True),
        Row("guidance", "dropout", sampling=s.guidance),
        Row("guidance that fades", "dropout", sampling=power),
        Row("noise, mean shift", "modern", shift=True),
        Row("noise, guidance", "modern", sampling=s.guidance),
        Row("mean shift, nearest neighbors", "dropout", shift=True, nearest=True),
        Row("mean shift, guidance", "dropout", shift=True, sampling=s.guidance),
        Row("noise, mean shift, guidance", "modern", shift=True, sampling=s.guidance),
        Row("all", "modern", shift=True, nearest=True, sampling=s.guidance),
    ]


class Study:
    """One data set's frozen models, cache and measure."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, args.output
        self.vqgan = str(args.vqgan or Path(train.__file__).parent.parent / "bundled")
        self.clip = FrozenCLIP(str(args.clip))
        self.experiment, self.setting = [f"experiment={args.experiment}"], SHAPES
        if args.experiment == "cifar10":
            names = json.loads((args.data / "classes.json").read_text())
            self.setting = replace(CIFAR, sentences=[f"a photo of a {name}" for name in names])
            self.experiment += [f"shards={args.data}", f"clip.model_name={args.clip}"]

    @cached_property
    def cache(self) -> Path:
        """Indices, CLIP embeddings and classes of all training images."""
        root = self.output / "cache"
        more = ["data.train_size=12000", "data.val_size=1000"]
        if self.args.experiment == "cifar10":
            more = [f"data.class_names={self.args.data / 'classes.json'}"]
        config = composed(*self.experiment, *more, "data.labels=true", name="encode")
        config.vqgan, config.output = self.vqgan, str(root)
        encode.encode(config)
        return root

    @cached_property
    def measure(self) -> ImageMetrics:
        """Judge or classifier, CLIP score, FID."""
        if self.args.experiment == "shapes":
            return ImageMetrics(feature_extractor("clip:shapes"), [0], {"shapes": self.clip}, shapes=True)
        net: Any = load_or_train(self.args.classifier, self.args.data, 10, 32, 2000)
        identity = f"cifar10 classifier {fingerprint(net.state_dict())}"
        features = Features(lambda images: ((hidden := net[:-1](images)), net[-1](hidden)), identity)
        return ImageMetrics(features, [0], {"cifar10": self.clip}, classes=self.setting.sentences)

    @cached_property
    def reference(self) -> RealImages:
        """Real images."""
        name = "shapes" if self.args.experiment == "shapes" else str(self.args.data / "val-*.tar")
        return RealImages(name, 32, count=5000)

    def trained(self, recipe: str, seed: int) -> Path:
        """The run folder of a recipe; trained where it is not there yet."""
        run = self.output / "runs" / f"{recipe}-{seed}"
        if (run / ("label_transformer" if recipe == "label" else "transformer") / "config.json").is_file():
            return run
        changes = [change.format(noise=self.setting.noise, tenth=self.args.steps // 10) for change in RECIPES[recipe]]
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
            *(f"model.{change}" for change in changes),
            *(["data.conditioning=class"] if recipe == "label" else []),
        )
        config.data.root, config.output = str(self.cache), str(run)
        train.train(config)
        return run

    def draw(self, row: Row, seed: int) -> Draw:
        """How a row's system draws."""
        if row.system == "vqgan_clip":
            vqgan = VQGAN.load(self.vqgan)
            return lambda captions, seeds: vqgan_clip(
                vqgan, self.clip, self.clip.encode_text(captions), steps=100, cutouts=16, seed=seeds
            )
        assert row.recipe
        run = self.trained(row.recipe, seed)
        if row.system == "pipeline":
            pipe = TextToImage.load(run)
            pipe.projector = self.projector(row)
            return drawing(pipe, **row.sampling)
        classes = ClassConditionalGenerator.load(run, **row.sampling)
        if row.system == "label":
            return lambda captions, seeds: classes.draw(self.classes_of(captions), seeds)
        return lambda captions, seeds: torch.stack(
            [
                search(classes, self.clip, c, min(10, len(classes.class_names)), 16, s).image
                for c, s in zip(captions, seeds)
            ]
        )

    def classes_of(self, captions: Sequence[str]) -> Tensor:
        """The class of each sentence."""
        return torch.tensor([self.setting.sentences.index(caption) for caption in captions])

    def projector(self, row: Row) -> EmbeddingProjector | None:
        """What a row does to the sentences' embeddings."""
        if not (row.shift or row.nearest):
            return None
        memory = TokenCacheDataset(self.cache / "train").embeddings()
        shift = mean_shift(memory, self.clip.encode_text(self.setting.sentences)) if row.shift else None
        return EmbeddingProjector(shift, memory if row.nearest else None)

    def folder(self, row: Row, seed: int) -> Path:
        """Where a row's numbers and pictures lie."""
        return self.output / "rows" / f"{row.name.replace(' ', '_').replace('/', '_')}-{seed}"

    def result(self, row: Row, seed: int) -> dict[str, float]:
        """A row's numbers from one seed."""
        folder = self.folder(row, seed)
        if not (folder / "metrics.json").is_file():
            count = self.args.optimised if row.system == "vqgan_clip" else self.args.num_images
            every = max(len(self.setting.sentences) // count, 1)
            captions = [self.setting.sentences[i * every % len(self.setting.sentences)] for i in range(count)]
            draw = self.draw(row, seed)
            source = GeneratedImages(draw, captions, 10_000 * seed, {"row": row.name, "steps": self.args.steps})
            evaluate(folder, source, self.measure, self.reference)
            first = captions[:: max(count // 8, 1)][:8]
            images = draw(first, list(range(len(first))))
            save_png(grid(to_pil(images), columns=8, captions=first, cell=96), folder / "grid.png")
        return json.loads((folder / "metrics.json").read_text())["metrics"]


def spread(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds and, with several, the standard deviation."""
    found = {}
    for name in (n for n in results[0] if n.startswith(SHOWN)):
        values = torch.tensor([result[name] for result in results], dtype=torch.float64)
        found[name] = values.mean().item()
        if len(values) > 1:
            found[f"{name}_std"] = values.std().item()
    return found


def sheet(study: Study, rows: Sequence[Row]) -> Image.Image:
    """The first pictures of every row, one below the other."""
    grids = [Image.open(study.folder(row, study.args.seeds[0]) / "grid.png") for row in rows]
    found = Image.new("RGB", (grids[0].width, sum(g.height + 22 for g in grids)), "white")
    top = 0
    for row, picture in zip(rows, grids):
        ImageDraw.Draw(found).text((6, top + 4), row.name, "black", ImageFont.load_default(size=14))
        found.paste(picture, (0, top + 22))
        top += picture.height + 22
    return found


def search_tables(study: Study) -> str:
    """Tables 1 and 2 of the CLIP-guided search, with FID of all images drawn for a k."""
    run = study.trained("label", study.args.seeds[0])
    classes = ClassConditionalGenerator.load(run, **study.setting.ours)
    prompts = study.setting.sentences[:: max(len(study.setting.sentences) // 20, 1)]
    kept: dict[int, list[Tensor]] = {}
    watch: Callable[..., None] = lambda k, seed, j, found: kept.setdefault(k, []).append(found.images)
    rows = search_table(
        classes, study.clip, prompts, real_images_score(study), ks=KS, seeds=study.args.seeds, keep=True, watch=watch
    )
    lines = []
    for row in rows:
        images = torch.cat(kept[row.k])
        source = GeneratedImages(
            lambda captions, numbers, images=images: images[numbers], [""] * len(images), 0, {"k": row.k}
        )
        fid = evaluate(study.output / "search" / str(row.k), source, study.measure.for_reference(), study.reference)
        mean, std = row.best_mean_std
        needed = row.needed_mean_std
        found = {"best CLIP score_mean": mean, "best CLIP score_std": std, "fid_0": (fid or {})["fid_0"]}
        if needed:
            found |= {"images needed_mean": needed[0], "images needed_std": needed[1]}
        lines.append((f"k = {row.k}", found))
    return table(lines)


def real_images_score(study: Study) -> float:
    """Mean CLIP score of real images and their sentences."""
    if study.args.experiment == "shapes":
        data = ShapesDataset(1000, seed=5)
        return real_score(study.clip, data.render(range(1000)), [str(a) for a in data.attributes])
    data = TokenCacheDataset(study.cache / "val")
    labels = torch.cat([torch.from_numpy(shard["label"].astype("int64")) for shard in data.shards])
    return (data.embeddings(len(data)) * study.clip.encode_text(study.setting.sentences)[labels]).sum(1).mean().item()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=["shapes", "cifar10"])
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--rows", choices=["systems", "gap", "search"], default="systems")
    p.add_argument("--data", type=Path, help="shards of make_shards.py, for cifar10")
    p.add_argument("--clip", default="shapes", help="folder of train_clip.py, for cifar10")
    p.add_argument("--vqgan", help="run of stage 1 (default: the bundled one for shapes)")
    p.add_argument("--classifier", type=Path, default=Path("runs/classifier.pt"), help="of recognise.py")
    p.add_argument("--steps", type=int, default=600, help="of every transformer (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--num-images", type=int, default=576, help="a row and seed (default: %(default)s)")
    p.add_argument("--optimised", type=int, default=48, help="the same of VQGAN-CLIP (default: %(default)s)")
    args = p.parse_args()
    set_up_logging()
    study, lines = Study(args), []
    if args.rows == "search":
        return write(args.output / "search.md", search_tables(study))
    rows = (systems if args.rows == "systems" else gap)(study.setting)
    for row in rows:
        lines.append((row.name, spread([study.result(row, seed) for seed in args.seeds])))
        write(args.output / f"{args.rows}.md", table(lines))
    save_png(sheet(study, rows), args.output / f"{args.rows}.png")


def write(path: Path, text: str) -> None:
    """The table so far."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    print(text, flush=True)


if __name__ == "__main__":
    main()
