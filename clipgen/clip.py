"""The frozen CLIP: images and sentences into one space (Eq. 1 of CLIP-GEN, arXiv:2203.00386)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode

from clipgen import clip_folder
from clipgen.files import one_line
from clipgen.images import check_images

logger = logging.getLogger(__name__)

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
BUNDLED_CLIPS = {"shapes": Path(__file__).parent / "bundled" / "clip"}
_CUT_WARNINGS = 10  # sentences that are named as too long
VOCABULARY_FILE = clip_folder.VOCABULARY


class WordTokenizer:
    """Whole words -> indices, for the small CLIPs that clipgen's scripts train.

    Index 0 pads, 1 starts; the largest index ends a sentence, where open_clip's text tower reads the embedding.
    """

    def __init__(self, words: Sequence[str], context_length: int):
        self.words, self.context_length = list(words), context_length
        self.warned: set[str] = set()
        self.index = {word: i for i, word in enumerate(self.words, start=2)}
        self.end = len(self.words) + 2

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Sentences -> (B, context_length) int64. Unknown words are left out, with a warning that lists the known."""
        texts = [texts] if isinstance(texts, str) else texts
        return torch.stack([self._encode(text) for text in texts])

    def _encode(self, text: str) -> Tensor:
        words = text.lower().replace(",", " ").rstrip(".!? ").split()
        unknown = [word for word in words if word not in self.index]
        if unknown and text not in self.warned:
            self.warned.add(text)
            names, vocabulary = ", ".join(map(repr, unknown)), ", ".join(sorted(self.words))
            logger.warning("This CLIP does not know %s in %r; it knows: %s.", names, text, vocabulary)
        known = [self.index[word] for word in words if word in self.index]
        tokens = [1, *known][: self.context_length - 1] + [self.end]
        return F.pad(torch.tensor(tokens), (0, self.context_length - len(tokens)))


class FrozenCLIP(nn.Module):
    """A CLIP that never trains: images and sentences -> unit vectors in one space (Eq. 1).

    Args:
        model_name: ``"shapes"`` (bundled), any open_clip architecture such as ``"ViT-B-32-quickgelu"``, a ``hf-hub:``
            name, or a folder with ``open_clip_config.json`` and weights (what ``scripts/train_clip.py`` writes).
        pretrained: an open_clip tag (``"openai"``) or a checkpoint file; only for open_clip architectures. OpenAI's
            weights need QuickGELU: a name without it is corrected, with a warning.

    Raises:
        ValueError: the name is unknown or its weights cannot be had; the message says what to do.
    """

    mean: Tensor
    std: Tensor
    cut_warnings = 0

    def __init__(self, model_name: str, pretrained: str | None = None):
        super().__init__()
        folder = find_folder(model_name)
        absolute = folder and model_name not in BUNDLED_CLIPS  # so that a later os.chdir does not lose it
        self.model_name, self.pretrained = str(folder) if absolute else model_name, pretrained
        if folder is None and model_name.startswith("hf-hub:"):
            folder = clip_folder.download(model_name)
        self.folder = folder
        model: Any
        if folder is None:
            name, quick_gelu = match_activation(model_name, pretrained)
            model = load_open_clip(name, pretrained, quick_gelu)
            self.tokenizer = load_tokenizer(name, model.context_length)
            preprocessing = getattr(model.visual, "preprocess_cfg", {})
        else:
            model, config, preprocessing = clip_folder.load_model(folder)
            self.tokenizer = load_folder_tokenizer(folder, config, model.context_length)
        self.model: Any = model.eval().requires_grad_(False)
        size = model.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.resize_mode = preprocessing.get("resize_mode", "shortest")
        bilinear = preprocessing.get("interpolation") == "bilinear"  # MobileCLIP, CLIPA, PE; as open_clip's own
        self.interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
        for key, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
            value = torch.tensor(preprocessing.get(key) or default)
            self.register_buffer(key, value.view(3, 1, 1), persistent=False)
        self.embed_dim = self.encode_text([""]).shape[1]
        self.eval()

    @classmethod
    def from_spec(cls, name: str) -> FrozenCLIP:
        """A CLIP by ``MODEL`` or ``MODEL:TAG``, as command lines write it; ``hf-hub:`` names have no tag."""
        model, _, tag = (name, "", "") if name.startswith(("hf-hub:", "local-dir:")) else name.partition(":")
        return cls(model, tag or None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.mean.device

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in evaluation mode, whatever an owning module is put into."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of any size -> CLIP's input size, mean and std; differentiable."""
        square = [self.image_size, self.image_size]
        size = square if self.resize_mode == "squash" else square[:1]  # one number: of the short side
        images = TF.resize((images + 1) / 2, size, self.interpolation, antialias=True)
        return (TF.center_crop(images, square) - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], any size -> (B, E), unit norm. Gradients reach the images."""
        check_images(images)
        return F.normalize(self.model.encode_image(self.preprocess(images)).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> (B, E), unit norm. A sentence longer than the context is cut, its end token kept."""
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of sentences, got the sentence {texts!r}")
        tokens = self.tokenizer(texts)
        self._warn_of_cut(texts, tokens)
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    def _warn_of_cut(self, texts: Sequence[str], tokens: Tensor) -> None:
        """Warn about sentences whose end the model does not read."""
        if tokens.shape[1] < 3 or self.cut_warnings >= _CUT_WARNINGS:
            return
        padding = self.tokenizer([""])[0, -1]
        for number in (tokens[:, -2] != padding).nonzero().flatten().tolist():
            # Only where the end is not read does a letter less, or a word of those that are whole, make no difference.
            shorter = texts[number].rstrip(" .,;:!?")[:-1]
            if isinstance(self.tokenizer, WordTokenizer):
                shorter = texts[number].rpartition(" ")[0]
            if torch.equal(self.tokenizer([shorter])[0], tokens[number]) and self.cut_warnings < _CUT_WARNINGS:
                self.cut_warnings += 1
                logger.warning(
                    "This CLIP reads %d tokens of a sentence, and not the end of %r (%d letters).%s",
                    tokens.shape[1],
                    texts[number][:100],
                    len(texts[number]),
                    " Further ones are not named." if self.cut_warnings == _CUT_WARNINGS else "",
                )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, to be written beside a model that was trained with this CLIP."""
        return {"model_name": self.model_name, "pretrained": self.pretrained}


def find_folder(model_name: str) -> Path | None:
    """The folder of a bundled name, or of a path to a folder; None for open_clip's and the hub's names."""
    path = BUNDLED_CLIPS.get(model_name, Path(model_name.removeprefix("local-dir:")).expanduser())
    if (path / "open_clip_config.json").is_file():
        return path.resolve()
    if path.is_dir():
        raise ValueError(
            f"no open_clip_config.json in the CLIP folder {path}; scripts/train_clip.py writes such folders"
        )
    return None


def match_activation(model_name: str, pretrained: str | None) -> tuple[str, bool]:
    """Make architecture and weights agree on QuickGELU: -> (name, force_quick_gelu).

    The weights of some tags (``openai`` first) were trained with QuickGELU; under the plain architecture they load
    without complaint and are quietly wrong.
    """
    plain = model_name.removesuffix("-quickgelu")
    with clip_folder.open_clip_interface():
        tag = open_clip.pretrained.get_pretrained_cfg(plain, pretrained) if pretrained else None
    if not tag:
        if pretrained and plain == model_name and f"{plain}-quickgelu" in open_clip.list_models():
            logger.warning("If %s holds OpenAI's weights, the model must be %s-quickgelu.", pretrained, plain)
        return model_name, False
    wanted = tag.get("quick_gelu", False)
    has = (open_clip.get_model_config(model_name) or {}).get("quick_gelu", False)
    if wanted != has:
        logger.warning("%s weights need quick_gelu=%s, which %s is not: corrected.", pretrained, wanted, model_name)
    return (model_name, wanted) if wanted or not has else (plain, False)


def load_open_clip(name: str, pretrained: str | None, quick_gelu: bool) -> torch.nn.Module:
    """Build a model of open_clip with its weights; ValueError in one sentence where that fails."""
    if name not in open_clip.list_models():
        raise ValueError(
            f"CLIP {name!r} is no bundled model ({', '.join(BUNDLED_CLIPS)}), folder, hf-hub: name or open_clip model"
        )
    if not pretrained:
        raise ValueError(
            f"clip.pretrained must name the weights of {name} (a tag such as openai, or a file), got nothing"
        )
    with clip_folder.open_clip_interface():
        try:
            model = open_clip.create_model(
                name, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True
            )
        except (ImportError, TypeError, AttributeError, NameError):  # another version's interface, not the weights
            raise
        except Exception as error:  # open_clip raises anything from KeyError to the hub's own errors
            raise ValueError(
                f"the weights of CLIP {name!r} (pretrained={pretrained!r}) cannot be loaded ({one_line(error)}): "
                "download them once where there is a network, or name their file in clip.pretrained"
            ) from error
    clip_folder.check_finite(model, f"CLIP {name!r} (pretrained={pretrained!r})")
    return model


def load_tokenizer(name: str, context_length: int) -> Any:
    """Load open_clip's tokenizer for one of its models."""
    with clip_folder.open_clip_interface():
        text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        safe = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
        return open_clip.get_tokenizer(name, context_length=context_length, **safe)


def load_folder_tokenizer(folder: Path, config: dict[str, Any], context_length: int) -> Any:
    """Load the tokenizer of a folder: its vocabulary of whole words if it has one, else open_clip's kind."""
    if not (folder / VOCABULARY_FILE).exists():
        return clip_folder.load_tokenizer(folder, config)
    size = config["text_cfg"].get("vocab_size", clip_folder.BYTE_PAIRS)
    path = clip_folder.member(folder, VOCABULARY_FILE)
    return WordTokenizer(clip_folder.read_vocabulary(path, size), context_length)
