"""Copy the models of a finished run into the package, in half precision.

Example: ``clipgen-demo --output demo && python -m clipgen bundle shapes demo/transformer``
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipgen import TextToImage
from clipgen.bundled import BUNDLED
from clipgen.frozen_models import copy_clip
from clipgen.generation.default_params import save_params
from clipgen.generation.modality_gap import PROJECTOR_FILE
from clipgen.storage.files import user_path, write_json
from clipgen.tokenizer_identity import record_tokenizer


def bundle(pipe: TextToImage, name: str) -> Path:
    """Write a pipeline to the folder of a bundled model; its CLIP can also be used by that name alone."""
    target = BUNDLED[name]
    if pipe.clip.folder is None:
        raise ValueError("a bundled model must have a CLIP of its own")
    pipe.vqgan.save(target / "vqgan", half=True)
    pipe.transformer.save(target / "transformer", half=True)
    record_tokenizer(target / "transformer", target / "vqgan")
    (target / PROJECTOR_FILE).unlink(missing_ok=True)
    if pipe.projector is not None:
        pipe.projector.save(target / PROJECTOR_FILE, half=True)
    save_params(target, pipe.params)
    if pipe.clip.folder != (target / "clip").resolve():
        copy_clip(pipe.clip.folder, target / "clip")
    write_json(target / "clip.json", {"model_name": name, "pretrained": None})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BUNDLED, help="name of the bundled model")
    parser.add_argument("run", type=user_path, help="stage-2 run folder")
    args = parser.parse_args()
    print(f"Wrote {bundle(TextToImage.load(args.run), args.name)}")


if __name__ == "__main__":
    main()
