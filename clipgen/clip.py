"""The frozen CLIP, which embeds images and texts in one space (Eq. 1 of CLIP-GEN, arXiv:2203.00386)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from clipgen.bundled import BUNDLED
from clipgen.checkpoint import clip_folder, clip_tokenizer
from clipgen.checkpoint.safe_load import check_weights_file
from clipgen.images import check_images
from clipgen.storage.files import one_line
from clipgen.storage.links import file_inside

logger = logging.getLogger(__name__)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Number of warnings about texts that are too long.
MAX_TRUNCATION_WARNINGS = 10
VOCABULARY_FILE = clip_folder.VOCABULARY


class WordTokenizer:
    """Tokenizer of whole words, for the small CLIPs that clipgen's scripts train.

    Index 0 is padding and 1 the start token. The largest index is the end token, at which open_clip's text tower reads
    the embedding.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        self.words = list(words)
        self.context_length = context_length
        self.warned: set[str] = set()
        self.index = {word: i for i, word in enumerate(self.words, start=2)}
        self.end = len(self.words) + 2

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenize texts: (B, context_length) int64. Unknown words are skipped with a warning."""
        texts = [texts] if isinstance(texts, str) else texts
        return torch.stack([self._encode(text) for text in texts])

    def _encode(self, text: str) -> Tensor:
        words = text.lower().replace(",", " ").rstrip(".!? ").split()
        unknown = [word for word in words if word not in self.index]
        if unknown and text not in self.warned:
            self.warned.add(text)
            names = ", ".join(map(repr, unknown))
            vocabulary = ", ".join(sorted(self.words))
            logger.warning("This CLIP does not know %s in %r; it knows: %s.", names, text, vocabulary)
        known = [self.index[word] for word in words if word in self.index]
        tokens = [1, *known][: self.context_length - 1] + [self.end]
        return F.pad(torch.tensor(tokens), (0, self.context_length - len(tokens)))


class FrozenCLIP(pl.LightningModule):
    """A CLIP that is never trained and maps images and texts to unit vectors in one space (Eq. 1).

    It is a LightningModule without a training step. Modules that use it keep it out of their checkpoints.

    Args:
        model_name: ``"shapes"`` or ``"cifar10"`` (bundled), any open_clip architecture such as
            ``"ViT-B-32-quickgelu"``, a ``hf-hub:`` name, or a folder with ``open_clip_config.json`` and weights (what
            ``python -m clipgen train_clip`` writes).
        pretrained: an open_clip tag (``"openai"``) or a checkpoint file; only for open_clip architectures. OpenAI's
            weights need QuickGELU; a name without it is corrected with a warning.

    Raises:
        ValueError: the name is unknown or its weights cannot be loaded; the message says what to do.
    """

    mean: Tensor
    std: Tensor
    num_truncation_warnings = 0

    def __init__(self, model_name: str, pretrained: str | None = None):
        super().__init__()
        folder = find_folder(model_name)
        # An absolute path stays valid after os.chdir.
        use_path = folder and model_name not in BUNDLED
        self.model_name = str(folder) if use_path else model_name
        self.pretrained = pretrained
        if folder is None and model_name.startswith("hf-hub:"):
            folder = clip_folder.download(model_name)
        self.folder = folder
        model: Any
        if folder is None:
            name, quick_gelu = match_activation(model_name, pretrained)
            model = load_open_clip(name, pretrained, quick_gelu)
            self.tokenizer = load_open_clip_tokenizer(name, model.context_length)
            preprocessing = getattr(model.visual, "preprocess_cfg", {})
        else:
            model, config, preprocessing = clip_folder.load_clip_model(folder)
            self.tokenizer = load_folder_tokenizer(folder, config, model.context_length)
        self.model: Any = model.eval().requires_grad_(False)
        size = model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.resize_mode = preprocessing.get("resize_mode", "shortest")
        # MobileCLIP, CLIPA and PE are bilinear, all other models of open_clip bicubic.
        bilinear = preprocessing.get("interpolation") == "bilinear"
        self.interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
        for key, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
            value = torch.tensor(preprocessing.get(key) or default)
            self.register_buffer(key, value.view(3, 1, 1), persistent=False)
        self.embed_dim = self.encode_text([""]).shape[1]
        self.eval()

    @classmethod
    def from_spec(cls, spec: str) -> FrozenCLIP:
        """Load a CLIP named ``MODEL`` or ``MODEL:TAG``, as in ``"ViT-B-32-quickgelu:openai"``.

        Folders and ``hf-hub:`` names have no tag.
        """
        if spec.startswith(("hf-hub:", "local-dir:")) or find_folder(spec):
            return cls(spec, None)
        model_name, _, pretrained = spec.partition(":")
        return cls(model_name, pretrained or None)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.mean.device

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in evaluation mode, even if an owning module is put into training mode."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and normalize images (B, 3, H, W) in [-1, 1] of any size as CLIP expects them; differentiable."""
        square = [self.image_size, self.image_size]
        size = square if self.resize_mode == "squash" else square[:1]  # one number is the short side
        images = TF.resize((images + 1) / 2, size, self.interpolation, antialias=True)
        return (TF.center_crop(images, square) - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in [-1, 1] of any size: -> (B, E), unit norm; differentiable."""
        check_images(images)
        return F.normalize(self.model.encode_image(self.preprocess(images)).float(), dim=-1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of all stages of the image encoder, each (B, C, h, w); differentiable.

        Args:
            images: (B, 3, H, W) in [-1, 1] of any size.
        """
        check_images(images)
        output = self.model.forward_intermediates(image=self.preprocess(images), intermediates_only=True)
        maps: list[Tensor] = output["image_intermediates"]
        return maps

    def perceptual_distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distance of pairs of images in the image encoder's feature maps: -> (B,); differentiable.

        It is LPIPS (arXiv:1801.03924, Eq. 1) with this network and without learned weights: the squared distance of
        the feature vectors, each normalized to length 1, averaged over positions and stages.
        """
        distances = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for a, b in zip(self.feature_maps(images), self.feature_maps(others))
        ]
        return torch.stack(distances).mean(dim=0)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: -> (B, E), unit norm. A text longer than the context is truncated, and its end token is kept."""
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got the string {texts!r}")
        tokens = self.tokenizer(texts)
        self._warn_about_truncation(texts, tokens)
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    def _warn_about_truncation(self, texts: Sequence[str], tokens: Tensor) -> None:
        """Warn about texts that are truncated."""
        if tokens.shape[1] < 3 or self.num_truncation_warnings >= MAX_TRUNCATION_WARNINGS:
            return
        padding = self.tokenizer([""])[0, -1]
        for number in (tokens[:, -2] != padding).nonzero().flatten().tolist():
            # A text is truncated if removing its last letter (or its last word) does not change the tokens.
            shorter = texts[number].rstrip(" .,;:!?")[:-1]
            if isinstance(self.tokenizer, WordTokenizer):
                shorter = texts[number].rpartition(" ")[0]
            if (
                torch.equal(self.tokenizer([shorter])[0], tokens[number])
                and self.num_truncation_warnings < MAX_TRUNCATION_WARNINGS
            ):
                self.num_truncation_warnings += 1
                logger.warning(
                    "This CLIP reads %d tokens of a text, and not the end of %r (%d letters).%s",
                    tokens.shape[1],
                    texts[number][:100],
                    len(texts[number]),
                    " Further texts are not reported."
                    if self.num_truncation_warnings == MAX_TRUNCATION_WARNINGS
                    else "",
                )

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, which are saved with a model that was trained with this CLIP."""
        return {"model_name": self.model_name, "pretrained": self.pretrained}


def find_folder(model_name: str) -> Path | None:
    """Return the folder of a bundled name or of a path; None for names of open_clip or the hub."""
    bundled = BUNDLED.get(model_name)
    path = bundled / "clip" if bundled else Path(model_name.removeprefix("local-dir:")).expanduser()
    if (path / "open_clip_config.json").is_file():
        return path.resolve()
    if path.is_dir():
        raise ValueError(
            f"no open_clip_config.json in the CLIP folder {path}; python -m clipgen train_clip writes such folders"
        )
    return None


def match_activation(model_name: str, pretrained: str | None) -> tuple[str, bool]:
    """Match the activation of the architecture to the weights: -> (name, force_quick_gelu).

    The weights of some tags (such as ``openai``) were trained with QuickGELU. They also load into the architecture
    without it, whose embeddings are then wrong.
    """
    base_name = model_name.removesuffix("-quickgelu")
    with clip_folder.open_clip_interface():
        tag = open_clip.pretrained.get_pretrained_cfg(base_name, pretrained) if pretrained else None
    if not tag:
        if pretrained and base_name == model_name and f"{base_name}-quickgelu" in open_clip.list_models():
            logger.warning("If %s holds OpenAI's weights, the model must be %s-quickgelu.", pretrained, base_name)
        return model_name, False
    required = tag.get("quick_gelu", False)
    actual = (open_clip.get_model_config(model_name) or {}).get("quick_gelu", False)
    if required == actual:
        return model_name, required
    logger.warning(
        "Weights %s require quick_gelu=%s, but %s has %s: corrected.", pretrained, required, model_name, actual
    )
    if required:
        return model_name, True
    return base_name, False


def load_open_clip(name: str, pretrained: str | None, quick_gelu: bool) -> torch.nn.Module:
    """Build a model of open_clip with its weights.

    Raises:
        ValueError: the model is unknown or its weights cannot be loaded.
    """
    if name not in open_clip.list_models():
        raise ValueError(
            f"CLIP {name!r} must be a bundled model ({', '.join(BUNDLED)}), a folder, an hf-hub: name or a model "
            "of open_clip"
        )
    if not pretrained:
        raise ValueError(f"clip.pretrained must name the weights of {name} (a tag such as openai, or a file), got none")
    if Path(pretrained).is_file():
        check_weights_file(Path(pretrained))
    with clip_folder.open_clip_interface():
        try:
            model = open_clip.create_model(
                name, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True
            )
        except (ImportError, TypeError, AttributeError, NameError):
            # Another version of open_clip; the weights are not the cause.
            raise
        except Exception as error:
            # open_clip raises various types, from KeyError to the hub's own errors.
            raise ValueError(
                f"the weights of CLIP {name!r} (pretrained={pretrained!r}) cannot be loaded ({one_line(error)}): "
                "download them once on a machine with a network, or give their file as clip.pretrained"
            ) from error
    clip_folder.check_finite_model(model, f"CLIP {name!r} (pretrained={pretrained!r})")
    return model


def load_open_clip_tokenizer(name: str, context_length: int) -> Any:
    """Load open_clip's tokenizer for one of its models."""
    with clip_folder.open_clip_interface():
        text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        safe = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
        return open_clip.get_tokenizer(name, context_length=context_length, **safe)


def load_folder_tokenizer(folder: Path, config: dict[str, Any], context_length: int) -> Any:
    """Load the tokenizer of a folder: of whole words if it has a vocabulary of them, else open_clip's."""
    if not (folder / VOCABULARY_FILE).exists():
        return clip_tokenizer.load_tokenizer(folder, config)
    size = config["text_cfg"].get("vocab_size", clip_folder.BYTE_PAIRS)
    path = file_inside(folder, VOCABULARY_FILE)
    return WordTokenizer(clip_tokenizer.read_vocabulary(path, size), context_length)
