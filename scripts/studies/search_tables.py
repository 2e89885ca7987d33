"""Tables 1 and 2 and Figure 2 of the CLIP-guided search."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.baselines.search import PAPER_KS, SearchResult, SearchRow, make_row, search_table
from clipgen.data.token_cache import TokenCacheDataset
from clipgen.evaluation.run import evaluate
from clipgen.evaluation.sources import GeneratedImages, RealImages
from clipgen.generation.file_names import underscored
from clipgen.hashing import hash_lines
from clipgen.images import save_png
from clipgen.visualization import line_chart
from studies.results import clip_note, markdown
from studies.rows import Row
from studies.workspace import SEED_STRIDE, Study

SEARCH_PROMPTS = 20
# Seed of the real images, which differ from those of the reference.
REAL_SEED = 7


def search_tables(study: Study) -> str:
    """Return the tables, and draw the figure.

    FID compares with real images of the same prompts, as in the paper, whose prompts are those of its test set. The row
    "real images" shows as many other real images of the prompts: the floor of FID, and their best CLIP score.
    """
    prompts = study.setting.prompts[:SEARCH_PROMPTS]
    params = study.tuned_params(Row("search", "class", "search"))
    generator = ClassConditionalGenerator.load(study.trained("class", study.args.seeds[0]), params)
    images: dict[int, list[Tensor]] = {}

    def keep_images(k: int, seed: int, prompt_number: int, result: SearchResult) -> None:
        assert result.images is not None
        images.setdefault(k, []).append(result.images)

    threshold = training_score(study)
    rows = search_table(
        generator,
        study.clip,
        prompts,
        threshold,
        ks=PAPER_KS,
        num_images=study.args.search_images,
        seeds=study.args.seeds,
        return_images=True,
        callback=keep_images,
    )
    draw_curves(rows, threshold, study.output / "search.png")
    real_row, real_images = real_search(study, prompts, threshold)
    lines = []
    for name, row, images_of_row in [
        ("real images", real_row, real_images),
        *((f"k = {row.k}", row, torch.cat(images[row.k])) for row in rows),
    ]:
        fid = search_fid(study, prompts, name, images_of_row)
        lines.append((name, row_cells(row, study.args.search_images) | {"FID": f"{fid:.4g}"}))
    return f"Threshold of the images needed, from the training set: {threshold:.4f}. {clip_note(study)}\n\n" + markdown(
        lines
    )


def row_cells(row: SearchRow, num_images: int) -> dict[str, str]:
    """Return the cells of Tables 1 and 2; "±" is the sample standard deviation over search seeds, as in the paper."""
    mean, std = row.best_mean_std
    needed = row.needed_mean_std
    return {
        "best CLIP score": f"{mean:.4f} ± {std:.4f}",
        "images needed": f"> {num_images}" if needed is None else f"{needed[0]:.2f} ± {needed[1]:.2f}",
    }


def search_fid(study: Study, prompts: list[str], name: str, images: Tensor) -> float:
    """Return the FID of images of the study's seeds to real images of the same prompts."""
    identity = {"search": name, "seeds": study.args.seeds, "prompts": prompts}
    source = GeneratedImages(lambda captions, numbers: images[numbers], [""] * len(images), 0, identity)
    # The results of other seeds or prompts are kept in folders of their own.
    digest = hash_lines([*map(str, study.args.seeds), *prompts])
    folder = study.output / "search" / f"{underscored(name)}-{digest[:8]}"
    metrics = evaluate(folder, source, study.metrics.for_reference(), search_reference(study, prompts))
    assert metrics is not None
    return metrics["fid_0"]


def search_reference(study: Study, prompts: list[str]) -> GeneratedImages | RealImages:
    """Return real images of the prompts; the ten prompts of CIFAR-10 are those of all validation images."""
    return study.real_reference(prompts) if study.is_shapes else study.reference


def real_search(study: Study, prompts: list[str], threshold: float) -> tuple[SearchRow, Tensor]:
    """Return the row of a search among real images of each prompt, and these images (N, 3, H, W)."""
    curves = torch.empty(len(study.args.seeds), len(prompts), study.args.search_images)
    images = []
    for seed_number, seed in enumerate(study.args.seeds):
        for prompt_number, prompt in enumerate(prompts):
            first = SEED_STRIDE * (REAL_SEED + seed) + prompt_number
            step = len(study.setting.prompts)
            numbers = [first + i * step for i in range(study.args.search_images)]
            images.append(study.real_images([prompt] * len(numbers), numbers))
            scores = (study.clip.encode_image(images[-1]) * study.clip.encode_text([prompt])).sum(dim=1)
            curves[seed_number, prompt_number] = scores.cummax(dim=0).values
    return make_row(0, curves, threshold), torch.cat(images)


def training_score(study: Study) -> float:
    """Return the mean CLIP score of the training images and their captions, the threshold of Table 2."""
    cache = TokenCacheDataset(study.token_cache / "train")
    shards = map(cache.shard, range(len(cache.files)))
    labels = torch.cat([torch.from_numpy(shard["label"].astype("int64")) for shard in shards])
    text = study.clip.encode_text(label_captions(study))[labels]
    return (cache.embeddings(len(cache)) * text).sum(dim=1).mean().item()


def label_captions(study: Study) -> list[str]:
    """Return the caption of each class of the token cache."""
    if not study.is_shapes:
        return study.setting.prompts
    from clipgen.data.shapes import ALL_ATTRIBUTES

    return [str(attributes) for attributes in ALL_ATTRIBUTES]


def draw_curves(rows: list[SearchRow], threshold: float, path: Path) -> None:
    """Draw the best CLIP score after each number of images for each k, as Figure 2 does."""
    curves = {f"k = {row.k}": row.curve.tolist() for row in rows}
    save_png(line_chart(curves, "images", "best CLIP score", threshold), path)
