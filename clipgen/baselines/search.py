"""Searching a class-conditional generator with CLIP: Algorithm 1 of "CLIP-guided Zero-Shot Text-to-Image Generation"
(Du, Yin, Gu), and the numbers of its Tables 1 and 2 and Figure 2.

The k classes whose names CLIP finds nearest to the prompt are kept; pictures of them are drawn at random, and the one
that CLIP finds nearest is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipgen.baselines.generators import Generator
from clipgen.clip import FrozenCLIP
from clipgen.hashing import hashed_seed

TEMPLATE = "An image of {label}"  # the paper's
KS = (1, 10, 20, 50, 100, 1000)  # the paper's
SEEDS = (42, 43, 44)  # the paper's
TEXTS = 256  # sentences encoded at a time


class SearchResult(NamedTuple):
    """What a search found."""

    image: Tensor  # (3, H, W) in [-1, 1]: the best
    score: float  # its cosine with the prompt
    class_index: int
    curve: Tensor  # (num_images,): the best score after b = 1, 2, ... images
    images: Tensor | None  # all of them (num_images, 3, H, W), where they were to be kept


def encode_labels(clip: FrozenCLIP, class_names: Sequence[str], template: str | None = None) -> Tensor:
    """CLIP embeddings of the classes' names in a template, (num_classes, E).

    Args:
        template: with {label} in it; None: the paper's, or for a CLIP of few words that lacks its words the bare names.

    Raises:
        ValueError: the template has no place for the name.
    """
    if template is None:
        known = getattr(getattr(clip, "tokenizer", None), "index", None)  # of a WordTokenizer
        words = TEMPLATE.lower().split()[:-1]
        template = TEMPLATE if known is None or all(word in known for word in words) else "{label}"
    if "{label}" not in template:
        raise ValueError(f"template must hold {{label}}, got {template!r}")
    texts = [template.replace("{label}", name) for name in class_names]
    return torch.cat([clip.encode_text(texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)])


def top_labels(labels: Tensor, clip_embedding: Tensor, k: int) -> Tensor:
    """The k classes nearest to a prompt, (k,), nearest first: the set Y of the paper.

    Args:
        labels: (num_classes, E), of ``encode_labels``. clip_embedding: the prompt's, (E,).

    Raises:
        ValueError: k is not in [1, num_classes].
    """
    if not 1 <= k <= len(labels):
        raise ValueError(f"k must be in [1, {len(labels)}], the number of classes, got {k}")
    return (labels @ clip_embedding).argsort(descending=True, stable=True)[:k].cpu()


def search(
    generator: Generator,
    clip: FrozenCLIP,
    prompt: str,
    k: int,
    num_images: int = 100,
    seed: int = 0,
    *,
    batch_size: int = 32,
    labels: Tensor | None = None,
    keep: bool = False,
) -> SearchResult:
    """Algorithm 1: draw ``num_images`` (b_max) images of the top-k classes, keep the nearest to the prompt.

    Image b follows from seed, prompt and b alone: from no other image, and not from the batch size; with all classes
    as k it is plain random search. (The paper's MAXCLIP begins at 0, so that it may find nothing; ours at -2.)

    Args:
        k: classes to draw from. labels: of ``encode_labels``, where they are at hand. keep: return all images too.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    target = clip.encode_text([prompt])[0]
    labels = encode_labels(clip, generator.class_names) if labels is None else labels
    chosen = top_labels(labels, target, k).sort().values  # in their own order: k = all is then a plain random draw
    noise, classes = draws(generator.noise_dim, chosen, num_images, f"{seed} {prompt}")
    scores, parts, best, score = [], [], None, -2.0
    for rows in torch.arange(num_images).split(batch_size):
        images = generator(noise[rows].to(generator.device), classes[rows].to(generator.device))
        with torch.no_grad():
            found = (clip.encode_image(images.to(clip.device)) @ target).cpu()
        scores.append(found)
        if found.max() > score:
            score, best = found.max().item(), images[found.argmax()].cpu()
        if keep:
            parts.append(images.cpu())
    curve = torch.cat(scores).cummax(dim=0).values
    assert best is not None
    return SearchResult(
        best, score, int(classes[torch.cat(scores).argmax()]), curve, torch.cat(parts) if keep else None
    )


def draws(noise_dim: int, chosen: Tensor, count: int, key: str) -> tuple[Tensor, Tensor]:
    """z ~ N(0, I) (count, noise_dim) and y ~ Uniform(chosen) (count,), each pair from a seed of its own."""
    noise, classes = torch.empty(count, noise_dim), torch.empty(count, dtype=torch.int64)
    for b in range(count):
        generator = torch.Generator().manual_seed(hashed_seed(f"{key} {b}"))
        classes[b] = chosen[int(torch.rand((), generator=generator, dtype=torch.float64) * len(chosen))]
        noise[b] = torch.randn(noise_dim, generator=generator)
    return noise, classes


def images_needed(curve: Tensor, threshold: float) -> int | None:
    """How many images it takes until the best score (num_images,) is above a threshold; None: more than there are."""
    above = (curve > threshold).nonzero()
    return int(above[0]) + 1 if len(above) else None


@dataclass(frozen=True)
class Row:
    """One k of the paper's Tables 1 and 2; a value a seed, of which the paper gives mean and standard deviation."""

    k: int
    best: list[float]  # best score after all images, mean over prompts
    needed: list[int | None]  # images until the mean of the best scores passes the threshold; None: more than drawn
    curve: Tensor  # (num_images,): Figure 2, mean over prompts and seeds

    @property
    def best_mean_std(self) -> tuple[float, float]:
        """Mean and (sample) standard deviation over seeds."""
        return mean_std(self.best)

    @property
    def needed_mean_std(self) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds; None where a seed did not get there."""
        there = [count for count in self.needed if count is not None]
        return mean_std(there) if there and len(there) == len(self.needed) else None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; of one value 0."""
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std().item() if len(values) > 1 else 0.0


Watch = Callable[[int, int, int, SearchResult], None]  # (k, seed, number of the prompt, what was found)


def search_table(
    generator: Generator,
    clip: FrozenCLIP,
    prompts: Sequence[str],
    threshold: float | None = None,
    *,
    ks: Sequence[int] = KS,
    num_images: int = 100,
    seeds: Sequence[int] = SEEDS,
    batch_size: int = 32,
    template: str | None = None,
    keep: bool = False,
    watch: Watch | None = None,
) -> list[Row]:
    """Tables 1 (but for FID) and 2 and Figure 2: every prompt searched with every k and seed.

    Args:
        threshold: mean CLIP score of real images and their captions, see ``real_score``; None: images are not counted.
        ks: numbers of classes; those above the number of classes stand for all of them.
        watch: called with each search; ``keep`` hands it all images, of which FID is computed elsewhere.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one, got none")
    labels, rows = encode_labels(clip, generator.class_names, template), []
    for k in sorted({min(k, len(generator.class_names)) for k in ks}):
        curves = torch.empty(len(seeds), len(prompts), num_images)
        for i, seed in enumerate(seeds):
            for j, prompt in enumerate(prompts):
                found = search(
                    generator, clip, prompt, k, num_images, seed, batch_size=batch_size, labels=labels, keep=keep
                )
                curves[i, j] = found.curve
                if watch:
                    watch(k, seed, j, found)
        means = curves.double().mean(dim=1)  # over prompts
        needed = [None if threshold is None else images_needed(curve, threshold) for curve in means]
        rows.append(Row(k, means[:, -1].tolist(), needed, means.mean(dim=0)))
    return rows


@torch.no_grad()
def real_score(clip: FrozenCLIP, images: Tensor, texts: Sequence[str]) -> float:
    """Mean cosine of images (B, 3, H, W) and their captions: the threshold of Table 2."""
    return (clip.encode_image(images) * clip.encode_text(texts)).sum(dim=-1).mean().item()
