"""From a sentence to pictures: CLIP embedding -> indices -> images."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipgen
from clipgen.checkpoint import model_folder
from clipgen.clip import FrozenCLIP
from clipgen.files import write_json
from clipgen.generation.generator import BATCH, ImageGenerator, Preview, Progress
from clipgen.generation.modality_gap import EmbeddingProjector
from clipgen.generation.prompts import Prompt, check_request, describe
from clipgen.images import from_pil, to_pil
from clipgen.model_card import TRAINING, model_card, training_settings
from clipgen.run_folder import load_clip, run_folder, save_frozen
from clipgen.sampling import DEFAULTS, check_sampling, per_sample_seeds
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

BRIDGE = "bridge.safetensors"


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
        transformer.attach(vqgan, clip)  # refuses parts that do not belong together
        super().__init__(vqgan, transformer)
        self.clip, self.bridge = clip, bridge
        self.training: dict[str, Any] = {}  # see ``training_settings``

    @classmethod
    def load(cls, path_or_name: str | Path) -> TextToImage:
        """Load ``"shapes"`` (bundled), a run folder of stage 2, a checkpoint inside one, what ``save`` wrote, or
        ``"hf-hub:OWNER/NAME"``, what ``push_to_hub`` uploaded."""
        path = model_folder.located(path_or_name)
        transformer = ConditionalTransformer.load(path)
        root = run_folder(path)
        bridge = EmbeddingProjector.load(root / BRIDGE) if (root / BRIDGE).is_file() else None
        pipe = cls(VQGAN.load(root), transformer, load_clip(root), bridge)
        pipe.training = training_settings(root)
        return pipe

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write tokenizer, CLIP and transformer below a folder, with a model card; what ``load`` reads."""
        save_frozen(Path(path), self.vqgan, self.clip, half)
        self.transformer.save(Path(path) / "transformer", half)
        if self.bridge:
            self.bridge.save(Path(path) / BRIDGE)
        if self.training:
            write_json(Path(path) / TRAINING, self.training)
        for name, has in ((BRIDGE, self.bridge), (TRAINING, self.training)):
            if not has:
                (Path(path) / name).unlink(missing_ok=True)  # of a pipeline that was there before
        card = Path(path) / "README.md"
        if not card.exists() or "library_name: clipgen" in card.read_text("utf-8"):  # else somebody's own
            card.write_text(model_card(self.vqgan, self.transformer, self.clip, self.training), "utf-8")
        return Path(path)

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
        *,
        temperature: float = 1.0,
        top_k: int = 300,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_power: float = 0.0,
        rerank_from: int | None = None,
        seed: int | None = None,
        complete: Image.Image | None = None,
        keep: float = 0.5,
        preview: Preview | None = None,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Draw pictures of a sentence, or of what else ``embed`` takes; of a list of these, together, which is faster.

        Args:
            num_images: how many to return of each. rerank_from: draw so many of each and return those that CLIP finds
                nearest.
            seed: image i of a prompt draws from ``seed + i`` (None: a random one); its ``info`` says so, with the
                settings.
            complete: a picture whose upper part, ``keep`` of its height, is taken over; the rest is drawn.
            preview: called with the images so far, (B, 3, h, W) in [-1, 1], after each row of indices.
            progress: called after each row with how many images it adds, a part of each; nothing is decoded for it.

        Returns:
            PIL images, prompt by prompt, best first where reranked.
        """
        settings: dict[str, Any] = dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
            guidance_power=guidance_power,
        )
        prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if not prompts:
            raise ValueError("prompt must hold at least one, got an empty list")
        for each in prompts:
            check_request(each, num_images, rerank_from)
        check_sampling(**settings)
        candidates = rerank_from or num_images
        seeds = per_sample_seeds(seed, candidates)
        # embedded one by one: a batch of CLIP's would round otherwise, and draw another picture
        rows = torch.cat([self.embed(each) for each in prompts]).repeat_interleave(candidates, dim=0)
        given = None if complete is None else self.upper_indices(complete, keep)
        images = self.generate(rows, seeds * len(prompts), **settings, given=given, preview=preview, progress=progress)
        told = settings | self._told(complete, keep)
        pictures = []
        for each, drawn in zip(prompts, images.split(candidates)):
            order = self._nearest(each, drawn)[:num_images] if rerank_from else list(range(num_images))
            asked = dict(prompt=describe(each)) | (dict(mixture=dict(each)) if isinstance(each, Mapping) else {})
            for i, picture in zip(order, to_pil(drawn[order])):
                picture.info.update(asked, seed=seeds[i], **told)
                pictures.append(picture)
        return pictures

    def _told(self, complete: Image.Image | None, keep: float) -> dict[str, Any]:
        """What metadata say of the model, and of the part of a picture that was taken over."""
        dtype = {} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}
        kept = {} if complete is None else {"complete": keep}
        return dict(clipgen=clipgen.__version__, model=self.fingerprint) | dtype | kept

    def _nearest(self, prompt: Prompt, images: Tensor) -> list[int]:
        """The order in which CLIP finds images fit a prompt: the sentence itself, not where the bridge moves it."""
        wanted = self.embed(prompt, bridged=False).expand(len(images), -1)
        return self.clip_scores(images, wanted).argsort(descending=True).tolist()

    @torch.no_grad()
    def generate(
        self,
        clip_embedding: Tensor,
        seed: int | Sequence[int] | None = None,
        *,
        given: Tensor | None = None,
        preview: Preview | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Tensor:
        """CLIP embeddings (B, E) of sentences or images -> images (B, 3, H, W) in [-1, 1], one a row.

        ``given`` (1, P): the indices that every image begins with. ``preview``, ``progress``, ``settings``: see
        ``__call__``.
        """
        uniforms = self.uniforms(seed, len(clip_embedding))
        return self.paint(clip_embedding, uniforms, given=given, preview=preview, progress=progress, **settings)

    @torch.no_grad()
    def clip_scores(self, images: Tensor, clip_embedding: Tensor) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) with embeddings (B, E), one by one."""
        pairs = zip(images.split(BATCH), clip_embedding.split(BATCH))
        return torch.cat([(self.clip.encode_image(some) * wanted).sum(dim=1) for some, wanted in pairs])

    def interpolate(
        self,
        first: Prompt,
        second: Prompt,
        steps: int = 8,
        *,
        seed: int | None = None,
        complete: Image.Image | None = None,
        keep: float = 0.5,
        preview: Preview | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures on the arc between two prompts' embeddings, all from one seed; the rest is as of ``__call__``."""
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}")
        for prompt in (first, second):
            check_request(prompt, steps, None)
        a, b = self.embed(first), self.embed(second)
        angle = torch.acos((a * b).sum().clamp(-1 + 1e-6, 1 - 1e-6))
        t = torch.linspace(0, 1, steps, device=a.device)[:, None]
        arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        (one,) = per_sample_seeds(seed, 1)
        given = None if complete is None else self.upper_indices(complete, keep)
        shown: dict[str, Any] = dict(preview=preview, progress=progress)
        pictures = to_pil(self.generate(arc, [one] * steps, given=given, **shown, **settings))
        ends = [dict(end) if isinstance(end, Mapping) else describe(end) for end in (first, second)]
        told = DEFAULTS | settings | self._told(complete, keep)
        for picture in pictures:
            picture.info.update(interpolate=ends, steps=steps, seed=one, **told)
        return pictures
