"""The model card of a pipeline, as the Hugging Face hub shows it."""

from __future__ import annotations

from pathlib import Path

import clipgen
from clipgen.clip import FrozenCLIP
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

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


def model_card(vqgan: VQGAN, transformer: ConditionalTransformer, clip: FrozenCLIP) -> str:
    """What the model is, how to draw with it, how it was trained."""
    settings = {"transformer": dict(transformer.hparams), "vqgan": dict(vqgan.hparams)}
    rows = [f"| {part} | {k} | {v} |" for part, values in settings.items() for k, v in values.items()]
    return CARD.format(clip=Path(clip.model_name).name, version=clipgen.__version__, rows="\n".join(rows))
