"""From a sentence to pictures: CLIP embedding -> indices -> images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipgen
from clipgen.atomic_folder import finish_swap, replace_folder
from clipgen.checkpoint import model_folder
from clipgen.clip import FrozenCLIP
from clipgen.files import write_json
from clipgen.generation.generator import DECODE_BATCH_SIZE, ImageGenerator, Preview, Progress
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.generation.prompts import Prompt, check_request, describe
from clipgen.images import from_pil, to_pil
from clipgen.model_card import TRAINING, model_card, training_settings
from clipgen.run_folder import bind, check_bound, check_clip_folder, check_inside, load_clip, run_folder, save_frozen
from clipgen.sampling import SamplingParams, per_sample_seeds
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

BRIDGE = "bridge.safetensors"
CARD = "README.md"
ENTRIES = ("vqgan", "transformer", "clip", "clip.json", BRIDGE, TRAINING, CARD)  # of a pipeline's folder


class TextToImage(ImageGenerator):
    """The whole of CLIP-GEN: a tokenizer, a transformer and the CLIP that the transformer was trained with.

    pipe = TextToImage.load("shapes")
    pipe("a large blue ring on a white background", seed=0)[0].save("ring.png")

    Args:
        bridge: moves the embeddings of sentences to where those of images lie; None leaves them where they are.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        transformer: ConditionalTransformer,
        clip: FrozenCLIP,
        bridge: EmbeddingProjector | None = None,
    ):
        transformer.attach_encoders(vqgan, clip)  # refuses parts that do not belong together
        super().__init__(vqgan, transformer)
        self.clip, self.bridge = clip, bridge
        self.training: dict[str, Any] = {}  # see ``training_settings``

    @classmethod
    def load(cls, path_or_name: str | Path) -> TextToImage:
        """Load ``"shapes"`` (bundled), a run folder of stage 2, a checkpoint inside one, what ``save`` wrote, or
        ``"hf-hub:OWNER/NAME"``, what ``push_to_hub`` uploaded."""
        path = model_folder.resolve_path(path_or_name)
        root = run_folder(path)
        finish_swap(root)
        models = [f"{part}/{name}" for part in ("vqgan", "transformer") for name in ("", *model_folder.FILES)]
        check_inside(root, *models, BRIDGE)
        bridge = EmbeddingProjector.load(root / BRIDGE) if (root / BRIDGE).is_file() else None
        transformer, vqgan = ConditionalTransformer.load(path), VQGAN.load(root)
        check_bound(model_folder.find_model(path, "ConditionalTransformer"), vqgan)
        pipe = cls(vqgan, transformer, load_clip(root), bridge)
        pipe.training = training_settings(root)
        return pipe

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write tokenizer, CLIP and transformer below a folder, with a model card; what ``load`` reads.

        An older pipeline there is replaced in one step; other files stay. If the process is killed, ``load`` finds the
        old pipeline or the new one, see ``swap``.
        """
        path = Path(path)
        check_parts(path.expanduser())
        with replace_folder(path, ENTRIES) as partial:
            save_frozen(partial, self.vqgan, self.clip, half)
            self.transformer.save(partial / "transformer", half)
            bind(partial / "transformer", partial / "vqgan")
            if self.bridge:
                self.bridge.save(partial / BRIDGE)
            if self.training:
                write_json(partial / TRAINING, self.training)
            if not keep_card(path.expanduser() / CARD, partial / CARD):
                card = model_card(self.vqgan, self.transformer, self.clip, self.training)
                (partial / CARD).write_text(card, "utf-8")
        return path

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Upload to the Hugging Face hub as ``OWNER/NAME``, for ``load("hf-hub:OWNER/NAME")``; returns the address."""
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        before = [BRIDGE, TRAINING, "clip/*"]  # of a pipeline that was there: this one may have none
        with tempfile.TemporaryDirectory() as folder:
            api.upload_folder(repo_id=address.repo_id, folder_path=self.save(folder), delete_patterns=before)
        return str(address)

    @property
    def parts(self) -> list[nn.Module]:
        """What a device holds."""
        return [*super().parts, self.clip, *([] if self.bridge is None else [self.bridge])]

    @property
    def fingerprint(self) -> str:
        """A short hash of what draws: transformer and tokenizer as they were when first asked for it, and bridge."""
        bridge = {} if self.bridge is None else self.bridge.state_dict()
        return self._fingerprint + (f"-{model_folder.fingerprint(bridge)[:4]}" if bridge else "")

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> embeddings (B, E), unit norm, where this pipeline draws from: behind the bridge."""
        found = self.clip.encode_text(texts)
        return found if self.bridge is None else self.bridge(found)

    @torch.no_grad()
    def embed(self, prompt: Prompt, bridged: bool = True) -> Tensor:
        """The CLIP embedding (1, E), unit norm, of what is asked for.

        Args:
            prompt: a sentence; a picture, for variations of it; a mixture ``{"a cat": 0.7, "a dog": 0.3}`` of
                sentences, with negative weights too; or an embedding (E,).
            bridged: move sentences to where images lie, which is what is drawn from; else as CLIP gives them.
        """
        encode_text = self.encode_text if bridged else self.clip.encode_text
        if isinstance(prompt, str):
            return encode_text([prompt])
        if isinstance(prompt, Image.Image):
            return self.clip.encode_image(from_pil(prompt).to(self.clip.device))
        if isinstance(prompt, Tensor):
            if prompt.shape not in ((width := self.clip.embed_dim,), (1, width)):
                raise ValueError(f"an embedding must be ({width},), got {tuple(prompt.shape)}")
            return F.normalize(prompt.reshape(1, -1).float().to(self.clip.device), dim=-1)
        weights = torch.tensor(list(prompt.values()), dtype=torch.float32, device=self.clip.device)
        return F.normalize(weights[None] @ encode_text(list(prompt)), dim=-1)

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        num_images: int = 1,
        params: SamplingParams | None = None,
        *,
        rerank_from: int | None = None,
        seed: int | None = None,
        outpaint: Image.Image | None = None,
        keep_fraction: float = 0.5,
        preview: Preview | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Generate images for a prompt, or for a list of prompts, which are batched together.

        Args:
            prompt: a sentence, or anything else that ``embed`` takes; or a list of these.
            num_images: images per prompt.
            params: sampling parameters; or pass them by name (``sampling``): temperature, top_k, top_p,
                guidance_scale, guidance_power, see ``SamplingParams``.
            rerank_from: number of candidates per prompt; the ``num_images`` with the highest CLIP score are returned.
            seed: image i of a prompt uses ``seed + i`` (None: a random seed). It is recorded in the image's ``info``.
            outpaint: image to complete: its upper part is kept, the rest is generated.
            keep_fraction: fraction of the height of ``outpaint`` that is kept.
            preview: called after each row of indices with the images so far, (B, 3, h, W) in [-1, 1].
            progress: called after each row of indices with the work done since the last call, in images (a fraction).

        Returns:
            PIL images, prompt by prompt; by descending CLIP score if reranked. Their ``info`` holds prompt, seed and
            sampling parameters.
        """
        params = params or SamplingParams(**sampling)
        prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if not prompts:
            raise ValueError("prompt must hold at least one prompt, got an empty list")
        for each in prompts:
            check_request(each, num_images, rerank_from)
        num_candidates = rerank_from or num_images
        seeds = per_sample_seeds(seed, num_candidates)
        # One at a time: embeddings of a batch differ by floating-point rounding, and would change the images.
        embeddings = torch.cat([self.embed(each) for each in prompts])
        images = self.generate(
            embeddings.repeat_interleave(num_candidates, dim=0),
            seeds * len(prompts),
            params,
            prefix=None if outpaint is None else self.upper_indices(outpaint, keep_fraction),
            preview=preview,
            progress=progress,
        )
        metadata = self._metadata(params, keep_fraction if outpaint else None)
        results = []
        for each, candidates in zip(prompts, images.split(num_candidates)):
            order = self._rank(each, candidates)[:num_images] if rerank_from else list(range(num_images))
            for i, image in zip(order, to_pil(candidates[order])):
                image.info.update(prompt_metadata(each), seed=seeds[i], **metadata)
                results.append(image)
        return results

    def _metadata(self, params: SamplingParams, keep_fraction: float | None) -> dict[str, Any]:
        """Return what every image's ``info`` records: sampling parameters, model, and dtype if not float32."""
        metadata: dict[str, Any] = {**asdict(params), "clipgen": clipgen.__version__, "model": self.fingerprint}
        if self.dtype != torch.float32:
            metadata["dtype"] = str(self.dtype).removeprefix("torch.")
        if keep_fraction is not None:
            metadata["keep_fraction"] = keep_fraction
        return metadata

    def _rank(self, prompt: Prompt, images: Tensor) -> list[int]:
        """Return the order of images by descending CLIP score with the prompt's own embedding, not the projected one."""
        embedding = self.embed(prompt, bridged=False).expand(len(images), -1)
        return self.clip_scores(images, embedding).argsort(descending=True).tolist()

    @torch.no_grad()
    def generate(
        self,
        clip_embedding: Tensor,
        seed: int | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        *,
        prefix: Tensor | None = None,
        preview: Preview | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Generate one image per CLIP embedding: (B, E) -> (B, 3, H, W) in [-1, 1].

        Args:
            clip_embedding: embeddings of sentences or images, (B, E).
            seed: image i uses ``seed + i``; or one seed per image.
            params: sampling parameters; or pass them by name (``sampling``).
            prefix: (1, P), the first indices of every image.
            preview: see ``__call__``.
            progress: see ``__call__``.
        """
        params = params or SamplingParams(**sampling)
        uniforms = self.uniforms(seed, len(clip_embedding))
        return self.generate_from_conditions(
            clip_embedding, uniforms, params, prefix=prefix, preview=preview, progress=progress
        )

    @torch.no_grad()
    def clip_scores(self, images: Tensor, clip_embedding: Tensor) -> Tensor:
        """Return the cosine similarity (B,) of images (B, 3, H, W) and embeddings (B, E), pair by pair."""
        scores = []
        for image_batch, embeddings in zip(images.split(DECODE_BATCH_SIZE), clip_embedding.split(DECODE_BATCH_SIZE)):
            scores.append((self.clip.encode_image(image_batch) * embeddings).sum(dim=1))
        return torch.cat(scores)

    def interpolate(
        self,
        first: Prompt,
        second: Prompt,
        steps: int = 8,
        params: SamplingParams | None = None,
        *,
        seed: int | None = None,
        outpaint: Image.Image | None = None,
        keep_fraction: float = 0.5,
        preview: Preview | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Generate images along the arc between the embeddings of two prompts, all from one seed.

        ``steps`` is the number of images; the other arguments are those of ``__call__``.
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}")
        for prompt in (first, second):
            check_request(prompt, steps, None)
        params = params or SamplingParams(**sampling)
        shared_seed = per_sample_seeds(seed, 1)[0]
        images = self.generate(
            slerp(self.embed(first), self.embed(second), steps),
            [shared_seed] * steps,
            params,
            prefix=None if outpaint is None else self.upper_indices(outpaint, keep_fraction),
            preview=preview,
            progress=progress,
        )
        results = to_pil(images)
        ends = [dict(end) if isinstance(end, Mapping) else describe(end) for end in (first, second)]
        metadata = self._metadata(params, keep_fraction if outpaint else None)
        for image in results:
            image.info.update(interpolate=ends, steps=steps, seed=shared_seed, **metadata)
        return results


def prompt_metadata(prompt: Prompt) -> dict[str, Any]:
    """Return what an image's ``info`` records of its prompt."""
    metadata: dict[str, Any] = {"prompt": describe(prompt)}
    if isinstance(prompt, Mapping):
        metadata["mixture"] = dict(prompt)
    return metadata


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Interpolate unit vectors (1, E) spherically: (steps, E), both ends included."""
    angle = torch.acos((start * end).sum().clamp(-1 + 1e-6, 1 - 1e-6))
    t = torch.linspace(0, 1, steps, device=start.device)[:, None]
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def check_parts(root: Path) -> None:
    """Raise FileExistsError if the name of a pipeline's part holds something else, which saving would remove."""
    check_clip_folder(root / "clip")
    for name in ("vqgan", "transformer"):
        part = root / name
        if part.exists() and not (
            part.is_dir() and {entry.name for entry in part.iterdir()} <= set(model_folder.FILES)
        ):
            raise FileExistsError(f"{part} exists and is more than a model folder: move it away, or name another place")


def keep_card(old: Path, new: Path) -> bool:
    """Copy a model card that somebody wrote; return False where there is none, or only one of ours."""
    if not old.is_file() or old.is_symlink() or "library_name: clipgen" in old.read_text("utf-8", "replace"):
        return False
    shutil.copyfile(old, new)
    return True
