"""Copy the models of a finished run into the package, in half precision.

Example: ``clipgen-demo --output demo && python -m clipgen bundle shapes demo/transformer``
"""

from __future__ import annotations

import argparse

from clipgen import TextToImage
from clipgen.bundled import BUNDLED
from clipgen.storage.files import user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BUNDLED, help="name of the bundled model")
    parser.add_argument("run", type=user_path, help="stage-2 run folder")
    args = parser.parse_args()
    TextToImage.load(args.run).save(BUNDLED[args.name], half=True)


if __name__ == "__main__":
    main()
