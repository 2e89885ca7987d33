"""The text-to-image pipeline: prompt -> CLIP embedding -> code indices -> images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipgen
from clipgen.checkpoint import model_folder
from clipgen.checkpoint.pretrained import PretrainedMixin
from clipgen.frozen_models import check_clip_folder, load_clip, run_folder, save_frozen
from clipgen.generation import default_params
from clipgen.generation.generator import DECODE_BATCH_SIZE, ImageGenerator
from clipgen.generation.modality_gap import PROJECTOR_FILE, EmbeddingProjector, load_projector
from clipgen.generation.options import GenerationOptions, Preview, Progress, resolve_options
from clipgen.generation.prompts import Prompt, check_request, describe, prompt_kind
from clipgen.images import from_pil, save_png, to_pil
from clipgen.model_card import SAMPLES_FILE, TRAINING_FILE, CardDetails, model_card, training_settings
from clipgen.models.conditioning import Conditioner
from clipgen.sampling import per_sample_seeds
from clipgen.sampling_params import SamplingParams, resolve_params
from clipgen.storage.atomic_folder import finish_swap, replace_folder
from clipgen.storage.files import write_json
from clipgen.storage.links import check_inside
from clipgen.tokenizer_identity import check_tokenizer, record_tokenizer
from clipgen.transformer import ConditionalTransformer
from clipgen.visualization import grid
from clipgen.vqgan import VQGAN

CARD_FILE = "README.md"
# Embeddings in 16 bits have a norm of 1 with about this error.
UNIT_TOLERANCE = 1e-3
# What ``save`` may replace in a folder; other files stay.
PIPELINE_ENTRIES = (
    "vqgan",
    "transformer",
    "clip",
    "clip.json",
    PROJECTOR_FILE,
    default_params.PARAMS_FILE,
    TRAINING_FILE,
    CARD_FILE,
    SAMPLES_FILE,
)


class TextToImage(PretrainedMixin, ImageGenerator):
    """Text-to-image pipeline: a VQ-GAN, a transformer, and the CLIP that the transformer was trained with.

        pipe = TextToImage.load("shapes")
        pipe("a large blue ring on a white background", seed=0)[0].save("ring.png")

    Args:
        vqgan: decodes code indices to images.
        transformer: samples code indices from CLIP embeddings.
        clip: embeds prompts; reranks images. A ``Conditioner``, usually a ``FrozenCLIP``.
        projector: moves text embeddings towards image embeddings; None uses them as they are.
        params: sampling parameters where a call gives none; ``load`` takes those of the training's grids.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        transformer: ConditionalTransformer,
        clip: Conditioner,
        projector: EmbeddingProjector | None = None,
        params: SamplingParams | None = None,
    ):
        transformer.attach_encoders(vqgan, clip)  # raises an error if they do not fit together
        super().__init__(vqgan, transformer)
        if projector is not None:
            projector.check_width(clip.embed_dim)
        self.clip = clip
        self.projector = projector
        self.params = params or SamplingParams()
        self.training: dict[str, Any] = {}  # see `training_settings`

    # -------------------------------------------------------------------------------------------------------- files

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> TextToImage:
        """Load a pipeline.

        Args:
            path_or_name: ``"shapes"`` or ``"cifar10"`` (bundled); a run folder of stage 2, or a checkpoint inside it; a
                folder written by ``save``; or ``"hf-hub:OWNER/NAME"``, uploaded by ``push_to_hub``.
            revision: branch, tag or commit on the hub.
            token: access token for a private repository; None uses that of ``hf auth login``, or ``HF_TOKEN``.
        """
        path = model_folder.resolve_path(path_or_name, revision, token)
        root = run_folder(path)
        finish_swap(root)
        check_inside(root, "vqgan", "transformer", PROJECTOR_FILE, default_params.PARAMS_FILE)
        for name in model_folder.MODEL_FILES:
            check_inside(root, f"vqgan/{name}", f"transformer/{name}")
        transformer = ConditionalTransformer.load(path)
        vqgan = VQGAN.load(root)
        check_tokenizer(model_folder.find_model(path, "ConditionalTransformer"), vqgan)
        pipe = cls(vqgan, transformer, load_clip(root), load_projector(root), default_params.load_params(root))
        pipe.training = training_settings(root)
        return pipe

    def save(self, path: str | Path, half: bool = False, card: CardDetails | None = None) -> Path:
        """Write VQ-GAN, CLIP, transformer and a model card to a folder that ``load`` reads.

        An older pipeline there is replaced in one step; other files stay. If the process is killed, ``load`` finds
        either the old pipeline or the new one, see ``atomic_folder``.

        Args:
            path: the folder.
            half: save the weights in 16 bits.
            card: content of the model card besides the settings of the model: license, data, samples, results.
        """
        path = Path(path)
        check_parts(path.expanduser())
        with replace_folder(path, PIPELINE_ENTRIES) as partial:
            save_frozen(partial, self.vqgan, self.clip, half)
            self.transformer.save(partial / "transformer", half)
            record_tokenizer(partial / "transformer", partial / "vqgan")
            if self.projector:
                self.projector.save(partial / PROJECTOR_FILE, half)
            default_params.save_params(partial, self.params)
            if self.training:
                write_json(partial / TRAINING_FILE, self.training)
            if not copy_user_card(path.expanduser() / CARD_FILE, partial / CARD_FILE):
                self._write_card(partial, card or CardDetails())
        return path

    def _write_card(self, folder: Path, details: CardDetails) -> None:
        """Write the model card, and the images for its prompts, each with seed 0."""
        details = replace(details, params=details.params or self.params)
        if details.prompts:
            images = self(list(details.prompts), params=details.params, seed=0)
            save_png(grid(images, captions=details.prompts), folder / SAMPLES_FILE)
        clip: Any = self.clip  # a FrozenCLIP, which `save_frozen` has checked
        text = model_card(self.vqgan, self.transformer, clip, self.training, details)
        (folder / CARD_FILE).write_text(text, "utf-8")

    def push_to_hub(
        self,
        name: str,
        private: bool = False,
        *,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        half: bool = False,
        card: CardDetails | None = None,
    ) -> str:
        """Upload to the Hugging Face hub, for ``load("hf-hub:OWNER/NAME")``; return the address.

        Args:
            name: ``"OWNER/NAME"``.
            private: create a private repository.
            revision: branch to upload to, created if it does not exist; None is the main branch.
            token: access token; None uses that of ``hf auth login``, or ``HF_TOKEN``.
            commit_message: message of the commit on the hub.
            half: see ``save``.
            card: see ``save``.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(address.repo_id, branch=revision, exist_ok=True)
        # Optional parts of an older pipeline there must not remain next to this one.
        optional = [PROJECTOR_FILE, TRAINING_FILE, SAMPLES_FILE, "clip/*"]
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, half, replace(card or CardDetails(), repository=address.repo_id))
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                delete_patterns=optional,
                revision=revision,
                commit_message=commit_message,
            )
        return str(address)

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that ``to`` moves to a device."""
        modules: list[Any] = [*super().parts, self.clip]
        if self.projector is not None:
            modules.append(self.projector)
        return modules

    @property
    def fingerprint(self) -> str:
        """A short hash of the weights: transformer and VQ-GAN before any cast, and the projector if there is one."""
        if self.projector is None or not self.projector.state_dict():
            return self._fingerprint
        return f"{self._fingerprint}-{self.projector.fingerprint[:4]}"

    # --------------------------------------------------------------------------------------------------- embeddings

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, E) of texts, unit norm, moved by the projector if there is one."""
        embeddings = self.clip.encode_text(texts)
        return embeddings if self.projector is None else self.projector(embeddings)

    @torch.no_grad()
    def embed(self, prompt: Prompt, projected: bool = True) -> Tensor:
        """Return the CLIP embedding (1, E) of a prompt, unit norm.

        Args:
            prompt: a text; an image, to generate variations of it; a mixture ``{"a cat": 0.7, "a dog": 0.3}`` of
                texts, whose weights may be negative; or an embedding (E,).
            projected: apply the projector to texts, as for generating; otherwise return CLIP's own embeddings.

        Raises:
            ValueError: an embedding has another width than the CLIP's.
        """
        encode_text = self.encode_text if projected else self.clip.encode_text
        if isinstance(prompt, str):
            return encode_text([prompt])
        if isinstance(prompt, Image.Image):
            return self.clip.encode_image(from_pil(prompt).to(self.clip.device))
        if isinstance(prompt, Tensor):
            width = self.clip.embed_dim
            if prompt.shape not in ((width,), (1, width)):
                raise ValueError(f"an embedding must be ({width},), got {tuple(prompt.shape)}")
            return F.normalize(prompt.reshape(1, -1).float().to(self.clip.device), dim=-1)
        weights = torch.tensor(list(prompt.values()), dtype=torch.float32, device=self.clip.device)
        return F.normalize(weights[None] @ encode_text(list(prompt)), dim=-1)

    @torch.no_grad()
    def clip_scores(self, images: Tensor, clip_embedding: Tensor) -> Tensor:
        """Return the cosine similarity (B,) of images (B, 3, H, W) and embeddings (B, E), pair by pair."""
        scores = []
        for image_batch, embeddings in zip(images.split(DECODE_BATCH_SIZE), clip_embedding.split(DECODE_BATCH_SIZE)):
            scores.append((self.clip.encode_image(image_batch) * embeddings).sum(dim=1))
        return torch.cat(scores)

    # --------------------------------------------------------------------------------------------------- generation

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
        **overrides: Any,
    ) -> list[Image.Image]:
        """Generate images for a prompt, or for a list of prompts, which are batched together.

        Args:
            prompt: a text, or anything else that ``embed`` takes; or a list of these.
            num_images: images per prompt.
            params: sampling parameters; None takes those of the pipeline.
            rerank_from: number of candidates per prompt; the ``num_images`` with the highest CLIP score are returned.
            seed: image i of a prompt uses ``seed + i``, which its ``info`` records; None uses a random seed.
            outpaint: image to complete: its upper part is kept, the rest is generated.
            keep_fraction: fraction of the height of ``outpaint`` that is kept.
            preview: called after each row of indices with the images so far.
            progress: called after each row of indices with the work done since the last call.
            overrides: fields of ``SamplingParams``, which override ``params``.

        Returns:
            PIL images, prompt by prompt, best first if reranked. Their ``info`` contains prompt, seed and parameters.

        Raises:
            TypeError: a prompt or the seed has a wrong type, or a name is not a field of ``SamplingParams``.
            ValueError: an argument is out of range, or there is no prompt.
        """
        params = resolve_params(params or self.params, overrides)
        options = GenerationOptions(outpaint, keep_fraction, preview, progress)
        prompts = checked_prompts(prompt, num_images, rerank_from)
        seeds = per_sample_seeds(seed, rerank_from or num_images)
        # Prompts are embedded one at a time: a batch differs by floating-point rounding, which changes the images.
        embeddings = torch.cat([self.embed(item) for item in prompts])
        embeddings = embeddings.repeat_interleave(len(seeds), dim=0)
        uniforms = self.uniforms(seeds * len(prompts), len(embeddings))
        candidates = self.generate_from_conditions(embeddings, uniforms, params, options)
        metadata = self._metadata(params, options)
        results = []
        for item, images in zip(prompts, candidates.split(len(seeds))):
            order = self._rank(item, images)[:num_images] if rerank_from else list(range(num_images))
            results += to_pil_with_metadata(images[order], item, [seeds[i] for i in order], metadata)
        return results

    def _metadata(self, params: SamplingParams, options: GenerationOptions) -> dict[str, Any]:
        """Return the entries of every image's ``info``: sampling parameters, model, and dtype if not float32."""
        metadata: dict[str, Any] = {**asdict(params), "clipgen": clipgen.__version__, "model": self.fingerprint}
        if self.dtype != torch.float32:
            metadata["dtype"] = str(self.dtype).removeprefix("torch.")
        if options.outpaint:
            metadata["keep_fraction"] = options.keep_fraction
        return metadata

    def _rank(self, prompt: Prompt, images: Tensor) -> list[int]:
        """Return the order of images by descending CLIP score with the prompt itself, not with its projection."""
        embedding = self.embed(prompt, projected=False).expand(len(images), -1)
        return self.clip_scores(images, embedding).argsort(descending=True).tolist()

    @torch.no_grad()
    def generate(
        self,
        clip_embedding: Tensor,
        seed: int | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate one image per CLIP embedding: (B, E) -> (B, 3, H, W) in [-1, 1].

        Args:
            clip_embedding: embeddings of texts or images, (B, E), which are scaled to unit norm.
            seed: image i uses ``seed + i``; or one seed per image.
            params: sampling parameters; None takes those of the pipeline.
            options: fields of ``SamplingParams``, which override ``params``, and of ``GenerationOptions``.

        Raises:
            TypeError: an option is unknown.
            ValueError: an embedding is not finite, or an argument is out of range.
        """
        params, generation_options = resolve_options(params or self.params, options)
        uniforms = self.uniforms(seed, len(clip_embedding))
        return self.generate_from_conditions(unit_vectors(clip_embedding), uniforms, params, generation_options)

    def interpolate(
        self,
        first: Prompt,
        second: Prompt,
        steps: int = 8,
        params: SamplingParams | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Generate images along the arc between the embeddings of two prompts, all from the same seed.

        Args:
            first: prompt of the first image.
            second: prompt of the last image.
            steps: number of images, at least 2.
            params: sampling parameters; None takes those of the pipeline.
            seed: seed of all images.
            options: fields of ``SamplingParams``, which override ``params``, and of ``GenerationOptions``.

        Raises:
            TypeError: a prompt or the seed has a wrong type, or an option is unknown.
            ValueError: an argument is out of range.
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}")
        for prompt in (first, second):
            check_request(prompt, steps, None)
        params, generation_options = resolve_options(params or self.params, options)
        shared_seed = per_sample_seeds(seed, 1)[0]
        embeddings = slerp(self.embed(first), self.embed(second), steps)
        uniforms = self.uniforms([shared_seed] * steps, steps)
        results = to_pil(self.generate_from_conditions(embeddings, uniforms, params, generation_options))
        ends = [describe_end(first), describe_end(second)]
        kinds = [prompt_kind(first), prompt_kind(second)]
        metadata = self._metadata(params, generation_options) | {"prompt_kind": kinds}
        for image in results:
            image.info.update(interpolate=ends, steps=steps, seed=shared_seed, **metadata)
        return results


def checked_prompts(
    prompt: Prompt | Sequence[Prompt],
    num_images: int,
    rerank_from: int | None,
) -> list[Any]:
    """Return the prompts of a call, which takes one prompt or a list of them; see ``check_request`` for errors."""
    prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if not prompts:
        raise ValueError("prompt must contain at least one prompt, got an empty list")
    for item in prompts:
        check_request(item, num_images, rerank_from)
    return prompts


def to_pil_with_metadata(
    images: Tensor,
    prompt: Prompt,
    seeds: Sequence[int],
    metadata: Mapping[str, Any],
) -> list[Image.Image]:
    """Convert images (B, 3, H, W) of one prompt to PIL, and record their metadata in ``info``."""
    results = to_pil(images)
    for image, seed in zip(results, seeds):
        image.info.update(prompt_metadata(prompt), seed=seed, **metadata)
    return results


def prompt_metadata(prompt: Prompt) -> dict[str, Any]:
    """Return the entries of an image's ``info`` that describe its prompt."""
    metadata: dict[str, Any] = {"prompt": describe(prompt), "prompt_kind": prompt_kind(prompt)}
    if isinstance(prompt, Mapping):
        metadata["prompt_mix"] = dict(prompt)
    return metadata


def describe_end(prompt: Prompt) -> Any:
    """Return an end of an interpolation as an image's ``info`` records it."""
    return dict(prompt) if isinstance(prompt, Mapping) else describe(prompt)


def unit_vectors(embeddings: Tensor) -> Tensor:
    """Scale embeddings (B, E) to unit norm; those that have it, apart from rounding, stay as they are, bit by bit.

    Raises:
        ValueError: an embedding is not finite.
    """
    if not embeddings.isfinite().all():
        raise ValueError("clip_embedding must be finite, got NaN or infinity")
    norms = embeddings.norm(dim=-1, keepdim=True)
    return torch.where((norms - 1).abs() < UNIT_TOLERANCE, embeddings, F.normalize(embeddings, dim=-1))


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Interpolate unit vectors (1, E) spherically: (steps, E), both ends included."""
    angle = torch.acos((start * end).sum().clamp(-1 + 1e-6, 1 - 1e-6))
    t = torch.linspace(0, 1, steps, device=start.device)[:, None]
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def check_parts(root: Path) -> None:
    """Raise FileExistsError if saving a pipeline would remove a folder that is not one of its parts."""
    check_clip_folder(root / "clip")
    for name in ("vqgan", "transformer"):
        model_folder.check_replaceable(root / name)


def copy_user_card(source: Path, target: Path) -> bool:
    """Copy a model card that a user wrote; return False if there is none, or only a generated one."""
    if not source.is_file() or source.is_symlink() or "library_name: clipgen" in source.read_text("utf-8", "replace"):
        return False
    shutil.copyfile(source, target)
    return True
