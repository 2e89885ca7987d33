"""The model card of a pipeline, as the Hugging Face hub shows it."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import clipgen
from clipgen.checkpoint.safe_load import add_prefix
from clipgen.clip import FrozenCLIP
from clipgen.files import one_line, read_json, read_yaml
from clipgen.inner_files import member
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)

KEY = re.compile(r"\w{1,60}")
# Holds the training settings in the folder of a pipeline.
TRAINING = "training.json"
CARD = """
A text-to-image model after CLIP-GEN (arXiv:2203.00386), trained by clipgen {version} from images alone.
Its CLIP: {clip}.

```python
from clipgen import TextToImage

TextToImage.load("hf-hub:OWNER/NAME")("a sentence")[0].save("picture.png")
```

| part | setting | value |
|---|---|---|
{rows}
"""


def training_settings(root: Path) -> dict[str, Any]:
    """Return the data and trainer settings of stage 2, read from its run or pipeline folder.

    Paths are omitted because they are local to the machine that trained the model. Only the card needs these settings,
    so a file that cannot be read causes a warning, and the model is loaded.
    """
    try:
        if (root / TRAINING).is_file():
            return settings_of(read_json(member(root, TRAINING)))
        if (root / "config.yaml").is_file():
            return settings_of(read_yaml(member(root, "config.yaml")))
    except (ValueError, OSError) as error:
        logger.warning("The model card will not say how the model was trained: %s", one_line(error))
    return {}


def settings_of(config: Any) -> dict[str, Any]:
    """Return the plain settings of data and trainer in a configuration, and nothing else."""
    settings = {}
    for part in ("data", "trainer"):
        values = config.get(part) if isinstance(config, dict) else None
        if not isinstance(values, dict):
            continue
        plain = {key: value for key, value in values.items() if is_plain(key, value)}
        if plain:
            settings[part] = plain
    return settings


def is_plain(key: Any, value: Any) -> bool:
    """Return whether a setting is a short name with a number or a short text that is not a path."""
    named = isinstance(key, str) and KEY.fullmatch(key) is not None
    scalar = isinstance(value, (bool, int, float, str)) and len(str(value)) <= 200
    return named and scalar and "/" not in str(value)


def model_card(vqgan: VQGAN, transformer: ConditionalTransformer, clip: FrozenCLIP, training: dict[str, Any]) -> str:
    """Return a model card: what the model is, how to generate images with it, how it was trained."""
    settings = {
        "transformer": flatten(transformer.hparams),
        "vqgan": flatten(vqgan.hparams),
        **settings_of(training),
    }
    rows = []
    for part, values in settings.items():
        for key, value in values.items():
            rows.append(f"| {part} | {cell(key)} | {cell(value)} |")
    text = CARD.format(clip=cell(Path(clip.model_name).name), version=clipgen.__version__, rows="\n".join(rows))
    metadata = ModelCardData(library_name="clipgen", pipeline_tag="text-to-image")
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}"))


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted names, as in "gan.weight"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= add_prefix(f"{key}.", flatten(value))
        else:
            flat[key] = value
    return flat


def cell(value: Any) -> str:
    """Return a value as plain text for a Markdown table, on one line and without markup."""
    text = html.escape(" ".join(str(value).split())[:200])
    return re.sub(r"([\\`*|!\[\]~])", r"\\\1", text)
