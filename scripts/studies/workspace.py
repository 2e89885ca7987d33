"""The frozen models, the data, the training runs and the metrics of a study."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from train_classifier import load_images, split_shards

from clipgen import VQGAN, FrozenCLIP, TextToImage
from clipgen.baselines.biggan_clip import BigGANCLIPParams, biggan_clip
from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.baselines.gan_files import load_gan
from clipgen.baselines.search import search
from clipgen.baselines.vqgan_clip import vqgan_clip
from clipgen.cli import encode, train
from clipgen.cli.config import compose_config
from clipgen.data.shapes import ALL_ATTRIBUTES, ShapesDataset, parse_caption
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.evaluation.classifier import load_classifier
from clipgen.evaluation.feature_store import FeatureStore
from clipgen.evaluation.features import feature_extractor, image_classifier_features
from clipgen.evaluation.image_metrics import ImageMetrics
from clipgen.evaluation.run import evaluate
from clipgen.evaluation.sources import GeneratedImages, GenerateFn, RealImages, make_generate_fn
from clipgen.generation.file_names import underscored
from clipgen.generation.modality_gap import EmbeddingProjector, mean_shift
from clipgen.hashing import hash_files
from clipgen.images import save_png, to_pil
from clipgen.sampling_params import SamplingParams
from clipgen.storage.files import user_path, write_json
from clipgen.visualization import grid
from studies import rows as study_rows
from studies.budget import equal_flops_steps, flops_per_step
from studies.rows import RECIPES, Row

# Image i of a seed of the study uses this many times the seed, plus i.
SEED_STRIDE = 100_000
SEARCH_CANDIDATES = 16  # images of each prompt in the row of the search
# Seed of the training runs and images that settings are tuned on.
TUNING_SEED = 1000
# Recipe whose cost defines equal budgets.
REFERENCE = "no_clip_loss"
IMAGE_SIZE = 32


class Study:
    """The frozen models, token cache, training runs and metrics of a dataset.

    Everything is written below ``args.output`` and kept there, so that an interrupted study resumes.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output: Path = args.output
        self.is_shapes = args.experiment == "shapes"
        self.vqgan: str = args.vqgan or "shapes"
        self.clip = FrozenCLIP.from_spec(args.clip)
        self.second_clip = FrozenCLIP.from_spec(args.second_clip) if args.second_clip else None
        self.experiment = ["experiment=shapes" if self.is_shapes else "experiment=cifar10_quick"]
        if self.is_shapes:
            tuning, reported = split_prompts([str(attributes) for attributes in ALL_ATTRIBUTES])
            self.setting = replace(study_rows.SHAPES, tuning_prompts=tuning, prompts=reported)
        else:
            names = json.loads((args.data / "classes.json").read_text())
            prompts = [f"a photo of a {name}" for name in names]
            # Ten prompts cannot be split: tuning uses other seeds.
            self.setting = replace(study_rows.CIFAR, tuning_prompts=prompts, prompts=prompts)
            self.experiment += [f"shards={args.data}", f"clip.model_name={args.clip}"]

    # -------------------------------------------------------------------------------------------------------- data

    @cached_property
    def token_cache(self) -> Path:
        """Indices, CLIP embeddings and classes of all training images, computed if they do not exist."""
        root = self.output / "cache"
        options = [f"data.train_size={self.args.train_size}", "data.val_size=1000"]
        if not self.is_shapes:
            options = [f"data.class_names={self.args.data / 'classes.json'}"]
        config = compose_config(*self.experiment, *options, "data.labels=true", name="encode")
        config.vqgan = self.vqgan
        config.output = str(root)
        encode.encode_from_config(config)
        return root

    @cached_property
    def classifier(self) -> Any:
        """The classifier of CIFAR-10, and its settings and accuracy."""
        return load_classifier(self.args.classifier)

    @cached_property
    def metrics(self) -> ImageMetrics:
        """The rule-based evaluator or the classifier, the CLIP scores, FID."""
        clips = {"conditioning": self.clip}
        if self.second_clip:
            clips["independent"] = self.second_clip
        if self.is_shapes:
            # In the features of the CLIP that did not select images, if there is one.
            features = feature_extractor(f"clip:{self.args.second_clip or self.args.clip}")
            return ImageMetrics(features, [0], clips, shapes=True)
        return ImageMetrics(image_classifier_features(self.classifier[0]), [0], clips, classes=self.setting.prompts)

    @cached_property
    def reference(self) -> GeneratedImages | RealImages:
        """Real images: of the reported prompts in equal parts, or the validation images."""
        if not self.is_shapes:
            return RealImages(str(self.args.data / "val-*.tar"), IMAGE_SIZE)
        return self.real_reference(self.setting.prompts)

    def real_reference(self, prompts: Sequence[str]) -> GeneratedImages:
        """Return a reference of real images that show the given prompts in equal parts."""
        captions = [prompts[i % len(prompts)] for i in range(self.args.num_reference)]
        identity = {"real images": self.args.experiment, "data": str(self.args.data)}
        return GeneratedImages(self.real_images, captions, SEED_STRIDE * TUNING_SEED, identity)

    def real_images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return a real image of each prompt: a new render, or an image that was held out of the classifier."""
        if self.is_shapes:
            renders = []
            for prompt, seed in zip(prompts, seeds):
                renders.append(ShapesDataset(1, seed=seed, attributes=[parse_caption(prompt)]).render([0]))
            return torch.cat(renders)
        chosen = []
        for prompt, seed in zip(prompts, seeds):
            pool = self.real_pools[self.setting.prompts.index(prompt)]
            per_class = max(self.args.num_images // len(self.setting.prompts), 1)
            number = seed // SEED_STRIDE * per_class + seed % SEED_STRIDE // len(self.setting.prompts)
            chosen.append(pool[number % len(pool)])
        return torch.stack(chosen).float() / 127.5 - 1

    @cached_property
    def real_pools(self) -> list[Tensor]:
        """The real images of each class, as bytes (N, 3, H, W), of the shards that were held out of the classifier."""
        trained, held_out = split_shards(self.args.data, self.classifier[1]["trained"]["held_out"])
        images = load_images(held_out or trained, IMAGE_SIZE)
        return [images.images[images.labels == number] for number in range(len(self.setting.prompts))]

    # --------------------------------------------------------------------------------------------------- training runs

    def config(self, recipe: str, rate: float, schedule: str, seed: int, steps: int) -> DictConfig:
        """Return the configuration of a training run."""
        settings = [text.format(noise=self.setting.noise) for text in RECIPES[recipe].settings]
        config = compose_config(
            "stage=transformer",
            *self.experiment,
            "data=cached",
            f"data.batch_size={study_rows.BATCH_SIZE}",
            f"seed={seed}",
            "logger=csv",
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={steps}",
            "trainer.limit_val_batches=10",
            "image_logger.num_images=1",
            "image_logger.prompts=[]",
            "image_logger.guidance_scale=1",  # most rows are trained without a null condition
            *(f"model.{setting}" for setting in settings),
            f"model.optimizer.learning_rate={rate}",
            f"model.optimizer.schedule={schedule}",
            f"model.optimizer.warmup_steps={steps // 10 if schedule == 'cosine' else 0}",
            *(["data.conditioning=class"] if recipe == "class" else []),
        )
        config.data.root = str(self.token_cache)
        return config

    def steps_of(self, recipe: str) -> int:
        """Return the number of steps of a recipe: the same for all, or with equal floating-point operations."""
        if self.args.equal == "steps":
            return int(self.args.steps)
        return equal_flops_steps(self.args.steps, self.flops_of(REFERENCE), self.flops_of(recipe))

    def flops_of(self, recipe: str) -> int:
        """Return the floating-point operations of a step of a recipe; they depend on neither rate nor schedule."""
        path = self.output / "flops.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if recipe not in known:
            config = self.config(recipe, 1e-3, "constant", 0, self.args.steps)
            config.output = str(self.output / "unused")
            known[recipe] = flops_per_step(config)
            write_json(path, known)
        return int(known[recipe])

    def trained(self, recipe: str, seed: int) -> Path:
        """Return the run folder of a recipe with its tuned rate and schedule, trained if it does not exist."""
        rate, schedule = self.tuned_training(recipe)
        return self.run(f"{recipe}-{seed}", recipe, rate, schedule, seed)

    def run(self, name: str, recipe: str, rate: float, schedule: str, seed: int) -> Path:
        """Return the run folder of a training run, trained if it does not exist."""
        run = self.output / "runs" / name
        model = "label_transformer" if recipe == "class" else "transformer"
        if not (run / model / "config.json").is_file():
            config = self.config(recipe, rate, schedule, seed, self.steps_of(recipe))
            config.output = str(run)
            train.train_from_config(config)
        return run

    def tuned_training(self, recipe: str) -> tuple[float, str]:
        """Return the learning rate and schedule with the lowest validation loss, from the same grid for each recipe."""
        entry = RECIPES[recipe]
        if entry.reference is not None:
            return self.tuned_training(entry.reference)
        rates = study_rows.LEARNING_RATES if entry.rate is None else (entry.rate,)
        schedules = study_rows.SCHEDULES if entry.schedule is None else (entry.schedule,)
        grid_points = list(product(rates, schedules))
        if len(grid_points) == 1:
            return grid_points[0]
        path = self.output / "tuning" / f"{recipe}.json"
        if not path.is_file():
            losses = []
            for rate, schedule in grid_points:
                run = self.run(f"tuning-{recipe}-{rate:g}-{schedule}", recipe, rate, schedule, TUNING_SEED)
                losses.append({"rate": rate, "schedule": schedule, "loss": validation_loss(run)})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, losses)
        best = min(json.loads(path.read_text()), key=lambda point: point["loss"])
        return best["rate"], best["schedule"]

    # -------------------------------------------------------------------------------------------------- generation

    def tuned_params(self, row: Row) -> SamplingParams:
        """Return a row's sampling parameters: its own, or those of a small grid that are best on the tuning split."""
        if row.params is not None or row.recipe is None:
            return row.params or SamplingParams()
        path = self.output / "tuning" / f"sampling-{row.recipe}.json"
        if not path.is_file():
            # The search row uses the parameters of the class-conditional transformer.
            system = "class" if row.system == "search" else row.system
            points = [asdict(params) | {"score": self.tuning_score(row, system, params)} for params in self.grid(row)]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, points)
        best = max(json.loads(path.read_text()), key=lambda point: point["score"])
        return SamplingParams(**{name: value for name, value in best.items() if name != "score"})

    def grid(self, row: Row) -> list[SamplingParams]:
        """Return the sampling parameters that are tried; guidance only if the recipe trains for it."""
        assert row.recipe is not None
        guidable = any("drop_prob=0.1" in setting for setting in RECIPES[row.recipe].settings)
        scales = study_rows.GUIDANCE_SCALES if guidable else (1.0,)
        return [SamplingParams(top_p=p, guidance_scale=scale) for p, scale in product(study_rows.TOP_PS, scales)]

    def tuning_score(self, row: Row, system: str, params: SamplingParams) -> float:
        """Return the fraction of correct images of the tuning prompts."""
        tried = replace(row, system=system, params=params)
        captions = spread(self.setting.tuning_prompts, self.args.num_tuning)
        assert row.recipe is not None
        run = self.run_for_tuning(row.recipe)
        generate = self.generate_fn(tried, run, params)
        images = generate(captions, [SEED_STRIDE * TUNING_SEED + i for i in range(len(captions))])
        scorer = replace(self.metrics, clips={}, features=self.metrics.features if not self.is_shapes else None)
        columns = scorer(images, captions)
        return float(columns["shapes"][:, 0].mean() if self.is_shapes else columns["accuracy"].mean())

    def run_for_tuning(self, recipe: str) -> Path:
        """Return the run on which a recipe's sampling is tuned, of a seed that is not reported."""
        rate, schedule = self.tuned_training(recipe)
        return self.run(f"tuning-{recipe}-{rate:g}-{schedule}", recipe, rate, schedule, TUNING_SEED)

    def row_fn(self, row: Row, seed: int) -> GenerateFn:
        """Return the function that generates the images of a row."""
        if row.system == "real":
            return self.real_images
        if row.system == "vqgan_clip":
            return self.optimize
        if row.system == "biggan_clip":
            return self.optimize_biggan
        assert row.recipe is not None
        return self.generate_fn(row, self.trained(row.recipe, seed), self.tuned_params(row))

    def generate_fn(self, row: Row, run: Path, params: SamplingParams) -> GenerateFn:
        """Return the function that generates images with a trained transformer."""
        if row.system == "pipeline":
            pipe = TextToImage.load(run)
            pipe.projector = self.projector(row)
            if row.best_of > 1:
                return best_images(pipe, params, row, len(self.setting.prompts))
            return make_generate_fn(pipe, params)
        generator = ClassConditionalGenerator.load(run, params)
        if row.system == "class":
            return lambda prompts, seeds: generator.generate(self.classes_of(generator, prompts), seeds)
        return lambda prompts, seeds: self.search_images(generator, prompts, seeds)

    def optimize(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return the images of VQGAN-CLIP."""
        targets = self.clip.encode_text(prompts)
        return vqgan_clip(
            VQGAN.load(self.vqgan),
            self.clip,
            targets,
            steps=self.args.optimization_steps,
            cutouts=self.args.cutouts,
            seed=seeds,
        )

    def optimize_biggan(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return the images of BigGAN-CLIP, with as many steps and cutouts as VQGAN-CLIP, and one class per layer."""
        generator: Any = load_gan(self.args.generator)
        params = BigGANCLIPParams(steps=self.args.optimization_steps, cutouts=self.args.cutouts, max_classes=1)
        images = []
        for prompt, seed in zip(prompts, seeds):
            target = self.clip.encode_text([prompt])
            images.append(biggan_clip(generator, self.clip, target, seed=seed, params=params))
        return torch.cat(images)

    def search_images(
        self, generator: ClassConditionalGenerator, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Tensor:
        """Return the best of 16 images of each prompt."""
        k = min(10, len(generator.class_names))
        images = []
        for prompt, seed in zip(prompts, seeds):
            images.append(search(generator, self.clip, prompt, k, SEARCH_CANDIDATES, seed).image)
        return torch.stack(images)

    def classes_of(self, generator: ClassConditionalGenerator, prompts: Sequence[str]) -> Tensor:
        """Return the class of each prompt, the class whose name it ends with or is."""
        indices = []
        for prompt in prompts:
            matching = (i for i, name in enumerate(generator.class_names) if prompt.endswith(name))
            indices.append(next(matching))
        return torch.tensor(indices)

    def projector(self, row: Row) -> EmbeddingProjector | None:
        """Return the projector of a row, which moves the embeddings of the prompts; None if it has none."""
        if not (row.shift or row.nearest):
            return None
        memory = TokenCacheDataset(self.token_cache / "train").embeddings()
        shift = mean_shift(memory, self.clip.encode_text(self.setting.prompts)) if row.shift else None
        return EmbeddingProjector(shift, memory if row.nearest else None)

    # --------------------------------------------------------------------------------------------------- measuring

    def folder(self, row: Row, seed: int) -> Path:
        """Return the folder of a row's results and grid; the row of a generator has one for each generator."""
        name = underscored(row.name)
        if row.system == "biggan_clip":
            name += f"-{self.generator_hash[:8]}"
        return self.output / "rows" / f"{name}-{seed}"

    @cached_property
    def generator_hash(self) -> str:
        """The hash of the files of the generator of BigGAN-CLIP, wherever they lie."""
        path = user_path(self.args.generator.partition(":")[2])
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        return hash_files(files)

    def captions_of(self, row: Row) -> list[str]:
        """Return the prompt of each image of a row, in equal parts."""
        count = self.args.num_optimized if row.is_small else self.args.num_images
        return spread(self.setting.prompts, count)

    def measured(self, row: Row, seed: int) -> FeatureStore:
        """Return the measurements of a row's images with one seed, generated and measured if they do not exist."""
        folder = self.folder(row, seed)
        if not (folder / "metrics.json").is_file():
            captions = self.captions_of(row)
            generate = self.row_fn(row, seed)
            identity = {"row": row.name, "steps": self.args.steps, "equal": self.args.equal}
            if row.system == "biggan_clip":
                identity["generator"] = self.generator_hash
            source = GeneratedImages(generate, captions, SEED_STRIDE * seed, identity)
            evaluate(folder, source, self.metrics, self.reference)
            shown = captions[:: max(len(captions) // 8, 1)][:8]
            images = generate(shown, [SEED_STRIDE * seed + i for i in range(len(shown))])
            save_png(grid(to_pil(images), columns=8, captions=shown, cell=96), folder / "grid.png")
        return FeatureStore(folder / "parts")

    def results(self, row: Row, seed: int) -> dict[str, float]:
        """Return the results of a row with one seed."""
        self.measured(row, seed)
        metrics: dict[str, float] = json.loads((self.folder(row, seed) / "metrics.json").read_text())["metrics"]
        return metrics


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split prompts at random into a tuning half and a reported half."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [prompts[i] for i in order]
    return shuffled[: len(prompts) // 2], shuffled[len(prompts) // 2 :]


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """Return ``count`` prompts: the first ones, or all of them in turn if ``count`` is larger."""
    return [prompts[i % len(prompts)] for i in range(count)]


def best_images(pipe: TextToImage, params: SamplingParams, row: Row, num_prompts: int) -> GenerateFn:
    """Return the function whose images are the ``keep`` best of ``best_of`` candidates of a prompt, by CLIP score.

    Images of a prompt are numbered by their seeds, and every ``keep`` of them share their candidates.
    """

    @cache
    def chosen(prompt: str, group: int) -> Tensor:
        text = pipe.encode_text([prompt]).expand(row.best_of, -1)
        images = pipe.generate(text, [group * row.best_of + i for i in range(row.best_of)], params)
        return images[pipe.clip_scores(images, text).argsort(descending=True)[: row.keep]]

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        images = []
        for prompt, seed in zip(prompts, seeds):
            group, rank = divmod(seed // num_prompts, row.keep)
            images.append(chosen(prompt, group)[rank])
        return torch.stack(images)

    return generate


def validation_loss(run: Path) -> float:
    """Return the last validation loss of a run."""
    (path,) = run.rglob("metrics.csv")
    with path.open() as file:
        losses = [line["val/cross_entropy"] for line in csv.DictReader(file) if line.get("val/cross_entropy")]
    return float(losses[-1])
