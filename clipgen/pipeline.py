"""From a sentence to pictures: CLIP embedding -> indices -> images."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import clipgen
from clipgen.clip import BUNDLED as BUNDLED_CLIPS
from clipgen.clip import FrozenCLIP, find_folder
from clipgen.images import to_pil
from clipgen.sampling import check_sampling, row_seeds
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

BUNDLED = {"shapes": Path(__file__).parent / "bundled"}
BATCH = 64  # images drawn at a time


class TextToImage:
    """The whole of CLIP-GEN: a tokenizer, a transformer and the CLIP that the transformer was trained with.

    pipe = TextToImage.load("shapes")
    pipe("a large blue ring on a white background", seed=0)[0].save("ring.png")
    """

    def __init__(self, vqgan: VQGAN, transformer: ConditionalTransformer, clip: FrozenCLIP):
        transformer.attach(vqgan, clip)  # refuses parts that do not belong together
        self.vqgan, self.transformer, self.clip = vqgan.eval(), transformer.eval(), clip
        self.side = math.isqrt(transformer.num_tokens)
        if self.side**2 != transformer.num_tokens:
            raise ValueError(f"num_tokens must be a square, for square pictures, got {transformer.num_tokens}")

    @classmethod
    def load(cls, path_or_name: str | Path) -> TextToImage:
        """Load ``"shapes"`` (bundled), a run folder of stage 2, a checkpoint inside one, or what ``save`` wrote."""
        path = Path(BUNDLED.get(str(path_or_name), path_or_name)).expanduser()
        transformer = ConditionalTransformer.load(path)
        root = path.parent.parent if path.is_file() else path.parent if (path / "config.json").is_file() else path
        return cls(VQGAN.load(root), transformer, load_clip(root))

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write tokenizer, CLIP and transformer below a folder; what ``load`` reads."""
        save_frozen(Path(path), self.vqgan, self.clip, half)
        self.transformer.save(Path(path) / "transformer", half)
        return Path(path)

    def to(self, device: str | torch.device) -> TextToImage:
        """Move all parts to a device."""
        for part in (self.vqgan, self.transformer, self.clip):
            part.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, prompt: str, num_images: int = 1, *, temperature: float = 1.0, top_k: int = 300, top_p: float = 1.0,
        guidance_scale: float = 1.0, rerank_from: int | None = None, seed: int | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """Draw pictures of a sentence.

        Args:
            num_images: how many to return. rerank_from: draw so many and return those that CLIP finds nearest.
            seed: image i draws from ``seed + i`` (None: a random one); its ``info`` says so, with the settings.

        Returns:
            PIL images, best first where reranked.
        """
        settings: dict[str, Any] = dict(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale
        )
        check_request(prompt, num_images, rerank_from)
        check_sampling(**settings)
        seeds = row_seeds(seed, rerank_from or num_images)
        clip_embedding = self.clip.encode_text([prompt])
        images = self.generate(clip_embedding.expand(len(seeds), -1), seeds, **settings)
        chosen = list(range(len(seeds)))
        if rerank_from:
            scores = self.clip.encode_image(images) @ clip_embedding[0]
            chosen = scores.argsort(descending=True)[:num_images].tolist()
        pictures = to_pil(images[chosen])
        for picture, i in zip(pictures, chosen):
            picture.info.update(prompt=prompt, seed=seeds[i], **settings, clipgen=clipgen.__version__)
        return pictures

    @torch.no_grad()
    def generate(self, clip_embedding: Tensor, seed: int | Sequence[int] | None = None, **settings: Any) -> Tensor:
        """CLIP embeddings (B, E) of sentences or images -> images (B, 3, H, W) in [-1, 1], one a row."""
        seeds = row_seeds(seed, len(clip_embedding))
        parts = []
        for start in range(0, len(seeds), BATCH):
            rows = slice(start, start + BATCH)
            indices = self.transformer.sample(clip_embedding[rows], seed=seeds[rows], **settings)
            parts.append(self.vqgan.decode(rearrange(indices, "b (h w) -> b h w", h=self.side)).clamp(-1, 1))
        return torch.cat(parts)


def check_request(prompt: str, num_images: int, rerank_from: int | None) -> None:
    """Raise ValueError unless the request makes sense."""
    if not prompt.strip():
        raise ValueError(f"prompt must not be empty, got {prompt!r}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if rerank_from is not None and rerank_from < num_images:
        raise ValueError(f"rerank_from must be at least num_images ({num_images}), got {rerank_from}")


def save_frozen(root: Path, vqgan: VQGAN, clip: FrozenCLIP, half: bool = False) -> None:
    """Write what a transformer needs beside it: ``vqgan/``, and ``clip.json`` with the CLIP's name.

    A CLIP that lives in a folder of its own is copied to ``clip/``, so that the whole can be moved.
    """
    root.mkdir(parents=True, exist_ok=True)
    vqgan.save(root / "vqgan", half)
    config, folder = clip.config(), find_folder(clip.model_name)
    if folder and clip.model_name not in BUNDLED_CLIPS:
        if folder != (root / "clip").resolve():
            shutil.rmtree(root / "clip", ignore_errors=True)  # nothing of another CLIP may stay: a vocabulary would
            shutil.copytree(folder, root / "clip")
        config["model_name"] = "clip"
    (root / "clip.json").write_text(json.dumps(config) + "\n")


def copy_frozen(source: Path, root: Path) -> None:
    """What ``save_frozen`` left in one folder, into another."""
    for name in ("vqgan", "clip"):
        if (source / name).is_dir():
            shutil.copytree(source / name, root / name, dirs_exist_ok=True)
    shutil.copy(source / "clip.json", root / "clip.json")


def load_clip(root: Path) -> FrozenCLIP:
    """The CLIP that ``clip.json`` of a folder names."""
    if not (root / "clip.json").is_file():
        raise FileNotFoundError(
            f"no clip.json in {root}: a pipeline folder or a run of `clipgen-train stage=transformer` has one"
        )
    try:
        config = json.loads((root / "clip.json").read_text())
        name, pretrained = config["model_name"], config["pretrained"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / 'clip.json'} is damaged: {error}") from error
    return FrozenCLIP(str(root / name) if (root / name).is_dir() else name, pretrained)
