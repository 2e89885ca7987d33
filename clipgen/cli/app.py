"""The command ``clipgen-app``: serve a web page that generates images."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from clipgen.bundled import BUNDLED_NAMES, DEFAULT
from clipgen.cli.console import run_command
from clipgen.cli.model_path import check_model_path
from clipgen.runs import OUTPUTS
from clipgen.storage.files import user_path


def main() -> None:
    """Run the command."""
    run_command("clipgen-app", run)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser("clipgen-app", description="Serve a web page that generates images.")
    parser.add_argument(
        "--checkpoint",
        metavar="MODEL",
        help="default model: run folder of stage 2, checkpoint, pipeline folder, hf-hub:OWNER/NAME, "
        f"{BUNDLED_NAMES} (default: the newest finished run below {OUTPUTS}/, else {DEFAULT})",
    )
    parser.add_argument(
        "--host",
        default=None,
        help="address to listen on; 0.0.0.0 lets other computers reach the page (default: 127.0.0.1, this one only)",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to listen on (default: the first free one from 7860)"
    )
    parser.add_argument(
        "--outputs",
        type=user_path,
        default=OUTPUTS,
        metavar="FOLDER",
        help="folder of the runs that visitors can choose (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: cuda if available, else mps, else cpu)")
    parser.add_argument(
        "--hub",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let visitors load models from the Hugging Face hub (default: only if the page is not public)",
    )
    return parser


def run() -> None:
    """Serve the page until Ctrl-C."""
    args = make_parser().parse_args()
    check_model_path(args.checkpoint, "ConditionalTransformer", ", `clipgen-sample --list` shows what there is")
    if find_spec("gradio") is None:
        raise ImportError("clipgen-app needs Gradio: pip install 'gradio>=6.27,<7'")
    from clipgen.app.server import serve

    serve(
        args.checkpoint,
        host=args.host,
        port=args.port,
        outputs=args.outputs,
        device=args.device,
        allow_hub=args.hub,
    )


if __name__ == "__main__":
    main()
