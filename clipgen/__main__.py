"""``python -m clipgen NAME ...``: run one of the scripts of the project, from any folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def scripts_dir() -> Path:
    """Return the folder of the scripts: inside the package in a wheel, beside it in a checkout or editable install."""
    package = Path(__file__).resolve().parent
    inside = package / "scripts"
    return inside if inside.is_dir() else package.parent / "scripts"


def main() -> None:
    """Run the script that the first argument names, with the others."""
    folder = scripts_dir()
    names = sorted(file.stem for file in folder.glob("*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m clipgen SCRIPT ..., with a SCRIPT of {', '.join(names)}; SCRIPT --help tells more")
    sys.argv = [str(folder / f"{sys.argv[1]}.py"), *sys.argv[2:]]
    sys.path.insert(0, str(folder))  # scripts import from one another
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
