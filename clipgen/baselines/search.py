"""Search of a class-conditional generator by CLIP: Algorithm 1 of "CLIP-guided Zero-Shot Text-to-Image Generation"
(Du, Yin, Gu), and the numbers of its Tables 1 and 2 and Figure 2.

The k classes whose names have the highest CLIP similarity to the prompt are kept. Images of random classes among them
are generated from random noise, and the image with the highest CLIP score is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipgen.baselines.generators import Generator
from clipgen.hashing import hashed_seed

PAPER_TEMPLATE = "An image of {label}"
PAPER_KS = (1, 10, 20, 50, 100, 1000)
PAPER_SEEDS = (42, 43, 44)
TEXT_BATCH_SIZE = 256


class ScoringCLIP(Protocol):
    """A CLIP that embeds texts and images as unit vectors, such as ``FrozenCLIP``."""

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts: -> (B, E), unit norm."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in [-1, 1]: -> (B, E), unit norm."""
        ...


class SearchResult(NamedTuple):
    """The result of a search.

    Args:
        image: the best image, (3, H, W) in [-1, 1].
        score: its cosine similarity with the prompt.
        class_index: its class.
        curve: best score after b = 1, 2, ... images, (num_images,).
        images: all images (num_images, 3, H, W), if ``return_images`` was set.
    """

    image: Tensor
    score: float
    class_index: int
    curve: Tensor
    images: Tensor | None


def encode_labels(clip: ScoringCLIP, class_names: Sequence[str], template: str | None = None) -> Tensor:
    """Return the CLIP embeddings of class names in a template, (num_classes, E).

    Args:
        clip: the CLIP model.
        class_names: names of the classes.
        template: text with {label} in it. None uses the paper's template; or only the names, if a CLIP with a
            small vocabulary does not know the words of the template.

    Raises:
        ValueError: the template has no {label}, or there are no class names.
    """
    if not class_names:
        raise ValueError("class_names must name the classes of the generator, got none: give --class-names")
    if template is None:
        template = PAPER_TEMPLATE if knows_template(clip) else "{label}"
    if "{label}" not in template:
        raise ValueError(f"template must contain {{label}}, got {template!r}")
    texts = [template.replace("{label}", name) for name in class_names]
    batches = [texts[start : start + TEXT_BATCH_SIZE] for start in range(0, len(texts), TEXT_BATCH_SIZE)]
    return torch.cat([clip.encode_text(batch) for batch in batches])


def knows_template(clip: ScoringCLIP) -> bool:
    """Return whether a CLIP knows the words of the paper's template; only a ``WordTokenizer`` may not."""
    vocabulary = getattr(getattr(clip, "tokenizer", None), "index", None)
    words = PAPER_TEMPLATE.lower().split()[:-1]
    return vocabulary is None or all(word in vocabulary for word in words)


def top_labels(label_embeddings: Tensor, clip_embedding: Tensor, k: int) -> Tensor:
    """Return the k classes nearest to a prompt, (k,), nearest first: the set Y of the paper.

    Args:
        label_embeddings: (num_classes, E), see ``encode_labels``.
        clip_embedding: embedding of the prompt, (E,).
        k: number of classes.

    Raises:
        ValueError: k is not in [1, num_classes].
    """
    if not 1 <= k <= len(label_embeddings):
        raise ValueError(f"k must be in [1, {len(label_embeddings)}], the number of classes, got {k}")
    return (label_embeddings @ clip_embedding).argsort(descending=True, stable=True)[:k].cpu()


def search(
    generator: Generator,
    clip: ScoringCLIP,
    prompt: str,
    k: int,
    num_images: int = 100,
    seed: int = 0,
    *,
    batch_size: int = 32,
    label_embeddings: Tensor | None = None,
    captions: Sequence[str] | None = None,
    return_images: bool = False,
) -> SearchResult:
    """Run Algorithm 1: generate images of the top-k classes and return the one with the highest CLIP score.

    Image b is a function of seed, prompt and b only, and not of the batch size. If k is the number of classes, this is
    plain random search. The paper's MAXCLIP starts at 0, so that a search may return nothing; here it starts at -2.

    Args:
        generator: the generator.
        clip: the CLIP model.
        prompt: the text.
        k: number of classes to sample from.
        num_images: number of images, b_max in the paper.
        seed: seed of classes and noise.
        batch_size: images per batch.
        label_embeddings: embeddings of the class names, see ``encode_labels``; None computes them.
        captions: texts of the same content, against a random one of which each image is scored; None scores all images
            against the prompt, which ranks the classes in any case.
        return_images: also return all images.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    target = clip.encode_text([prompt])[0]
    if label_embeddings is None:
        label_embeddings = encode_labels(clip, generator.class_names)
    # Sorted by index, so that a search with all classes samples the same ones regardless of CLIP's ranking.
    candidates = top_labels(label_embeddings, target, k).sort().values
    noise, classes = sample_inputs(generator.noise_dim, candidates, num_images, f"{seed} {prompt}")
    targets = target.expand(num_images, -1)
    if captions:
        targets = clip.encode_text(captions)[sample_captions(len(captions), num_images, f"{seed} {prompt}")]
    batches = score_batches(generator, clip, targets, noise, classes, batch_size)
    return collect_result(batches, classes, return_images)


def score_batches(
    generator: Generator, clip: ScoringCLIP, targets: Tensor, noise: Tensor, classes: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the generator's images and their cosine similarity (B,) with the targets (N, E), batch by batch."""
    for batch in zip(noise.split(batch_size), classes.split(batch_size), targets.split(batch_size)):
        noise_batch, class_batch, target_batch = batch
        images = generator(noise_batch.to(generator.device), class_batch.to(generator.device))
        with torch.no_grad():
            yield images, (clip.encode_image(images.to(clip.device)) * target_batch).sum(dim=1).cpu()


def collect_result(batches: Iterable[tuple[Tensor, Tensor]], classes: Tensor, return_images: bool) -> SearchResult:
    """Return the result of a search from batches of images and scores."""
    best_image = torch.empty(0)
    best_score = -2.0
    scores: list[Tensor] = []
    kept: list[Tensor] = []
    for images, batch_scores in batches:
        scores.append(batch_scores)
        if batch_scores.max() > best_score:
            best_score = batch_scores.max().item()
            best_image = images[batch_scores.argmax()].cpu()
        if return_images:
            kept.append(images.cpu())
    all_scores = torch.cat(scores)
    return SearchResult(
        image=best_image,
        score=best_score,
        class_index=int(classes[all_scores.argmax()]),
        curve=all_scores.cummax(dim=0).values,
        images=torch.cat(kept) if return_images else None,
    )


def sample_inputs(noise_dim: int, candidates: Tensor, count: int, key: str) -> tuple[Tensor, Tensor]:
    """Sample z ~ N(0, I) (count, noise_dim) and y ~ Uniform(candidates) (count,), each pair from its own seed."""
    noise = torch.empty(count, noise_dim)
    classes = torch.empty(count, dtype=torch.int64)
    for b in range(count):
        generator = torch.Generator().manual_seed(hashed_seed(f"{key} {b}"))
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        classes[b] = candidates[int(uniform * len(candidates))]
        noise[b] = torch.randn(noise_dim, generator=generator)
    return noise, classes


def sample_captions(num_captions: int, count: int, key: str) -> Tensor:
    """Sample the index of a caption for each image, (count,)."""
    generator = torch.Generator().manual_seed(hashed_seed(f"{key} captions"))
    return torch.randint(num_captions, (count,), generator=generator)


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class SearchRow:
    """One k of the paper's Tables 1 and 2, with one value per seed; the paper gives mean and standard deviation.

    Args:
        k: number of classes to sample from.
        best: best score after all images, mean over prompts.
        needed: number of images until the mean of the best scores exceeds the threshold; None if it does not.
        curve: best score after b images, mean over prompts and seeds, (num_images,): Figure 2.
    """

    k: int
    best: list[float]
    needed: list[int | None]
    curve: Tensor

    @property
    def best_mean_std(self) -> tuple[float, float]:
        """Mean and sample standard deviation over seeds."""
        return mean_std(self.best)

    @property
    def needed_mean_std(self) -> tuple[float, float] | None:
        """Mean and sample standard deviation over seeds; None if the threshold was not reached with every seed."""
        counts = [count for count in self.needed if count is not None]
        return mean_std(counts) if counts and len(counts) == len(self.needed) else None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation, 0 for a single value."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item() if len(values) > 1 else 0.0


def images_needed(curve: Tensor, threshold: float) -> int | None:
    """Return the number of images until the best score (num_images,) exceeds a threshold; None if it does not."""
    above = (curve > threshold).nonzero()
    return int(above[0]) + 1 if len(above) else None


SearchCallback = Callable[[int, int, int, SearchResult], None]  # k, seed, number of the prompt, result


def search_table(
    generator: Generator,
    clip: ScoringCLIP,
    prompts: Sequence[str],
    threshold: float | None = None,
    *,
    ks: Sequence[int] = PAPER_KS,
    num_images: int = 100,
    seeds: Sequence[int] = PAPER_SEEDS,
    batch_size: int = 32,
    template: str | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    return_images: bool = False,
    callback: SearchCallback | None = None,
) -> list[SearchRow]:
    """Search every prompt with every k and seed: Table 1 without FID, Table 2 and Figure 2.

    Args:
        generator: the generator.
        clip: the CLIP model.
        prompts: the texts.
        threshold: mean CLIP score of real images, see ``real_score``; None does not count images.
        ks: numbers of classes; larger ones than the number of classes are replaced by it.
        num_images: images per search.
        seeds: seeds to average over.
        batch_size: images per batch.
        template: template of the class names, see ``encode_labels``.
        captions: for each prompt the captions of ``search``; None uses the prompt alone.
        return_images: let the callback receive all images, for example to compute FID.
        callback: called after each search.

    Raises:
        ValueError: there are no prompts, or an argument is out of range.
    """
    if not prompts:
        raise ValueError("prompts must contain at least one prompt, got none")
    label_embeddings = encode_labels(clip, generator.class_names, template)
    options: Any = dict(batch_size=batch_size, label_embeddings=label_embeddings, return_images=return_images)
    rows = []
    for k in sorted({min(k, len(generator.class_names)) for k in ks}):
        curves = torch.empty(len(seeds), len(prompts), num_images)
        for seed_number, seed in enumerate(seeds):
            for prompt_number, prompt in enumerate(prompts):
                texts = captions[prompt_number] if captions else None
                result = search(generator, clip, prompt, k, num_images, seed, captions=texts, **options)
                curves[seed_number, prompt_number] = result.curve
                if callback:
                    callback(k, seed, prompt_number, result)
        rows.append(make_row(k, curves, threshold))
    return rows


def make_row(k: int, curves: Tensor, threshold: float | None) -> SearchRow:
    """Return the row of a k from the curves of all searches, (seeds, prompts, num_images)."""
    mean_curves = curves.double().mean(dim=1)
    needed: list[int | None] = [None] * len(mean_curves)
    if threshold is not None:
        needed = [images_needed(curve, threshold) for curve in mean_curves]
    return SearchRow(k, mean_curves[:, -1].tolist(), needed, mean_curves.mean(dim=0))


@torch.no_grad()
def real_score(clip: ScoringCLIP, images: Tensor, captions: Sequence[str]) -> float:
    """Return the mean cosine similarity of images (B, 3, H, W) and their captions: the threshold of Table 2."""
    return (clip.encode_image(images) * clip.encode_text(captions)).sum(dim=-1).mean().item()
