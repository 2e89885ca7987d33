"""The model card of a pipeline, as the Hugging Face hub shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clipgen
from clipgen.clip import FrozenCLIP
from clipgen.files import read_json
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

TRAINING = "training.json"  # in a pipeline's folder
CARD = """---
library_name: clipgen
pipeline_tag: text-to-image
---

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
    """On which data and for how long stage 2 was trained, by the folder of its run or pipeline; {} where nobody says.
    Paths are left out: they are the trainer's own."""
    if (root / TRAINING).is_file():
        return read_json(root / TRAINING)
    if not (root / "config.yaml").is_file():
        return {}
    import yaml  # the bundled model is drawn from without it

    config = yaml.safe_load((root / "config.yaml").read_text("utf-8"))
    told = lambda value: value is not None and not isinstance(value, (list, dict)) and "/" not in str(value)
    return {part: {k: v for k, v in config[part].items() if told(v)} for part in ("data", "trainer")}


def model_card(vqgan: VQGAN, transformer: ConditionalTransformer, clip: FrozenCLIP, training: dict[str, Any]) -> str:
    """What the model is, how to draw with it, how it was trained."""
    settings = {"transformer": dict(transformer.hparams), "vqgan": dict(vqgan.hparams), **training}
    rows = [f"| {part} | {k} | {v} |" for part, values in settings.items() for k, v in values.items()]
    return CARD.format(clip=Path(clip.model_name).name, version=clipgen.__version__, rows="\n".join(rows))
