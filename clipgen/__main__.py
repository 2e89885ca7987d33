"""Run a script of the project from any folder: ``python -m clipgen SCRIPT ...``. Errors are printed in one line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from clipgen.cli.console import run_command


def scripts_dir() -> Path:
    """Return the folder of the scripts: inside the package in a wheel, else next to it in the repository."""
    package = Path(__file__).resolve().parent
    packaged = package / "scripts"
    return packaged if packaged.is_dir() else package.parent / "scripts"


def main() -> None:
    """Run the script named by the first argument with the remaining arguments."""
    folder = scripts_dir()
    names = sorted(file.stem for file in folder.glob("*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m clipgen SCRIPT ...; SCRIPT is one of {', '.join(names)}; see also SCRIPT --help")
    sys.argv = [str(folder / f"{sys.argv[1]}.py"), *sys.argv[2:]]
    sys.path.insert(0, str(folder))  # scripts import from each other
    run_command(Path(sys.argv[0]).name, lambda: run_script(sys.argv[0]))


def run_script(path: str) -> None:
    """Run the file of a script."""
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
