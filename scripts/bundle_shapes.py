"""Copy the models of a finished demo into the package, in half precision.

Example: ``clipgen-demo --output demo && python -m clipgen bundle_shapes demo/transformer``
"""

from __future__ import annotations

import argparse

from clipgen import TextToImage
from clipgen.checkpoint.model_folder import BUNDLED
from clipgen.storage.files import user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="stage-2 run folder")
    TextToImage.load(parser.parse_args().run).save(BUNDLED["shapes"], half=True)


if __name__ == "__main__":
    main()
