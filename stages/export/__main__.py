"""`python -m stages.export`: a registered model, or an artifact, as a Hugging Face folder, an adapter, GGUF, or a
repository of the hub."""

import argparse
import logging
import sys
from pathlib import Path

from stages.config.errors import StageError
from stages.config.text import printable
from stages.export.request import GGUF_TYPES, Dtype, ExportRequest
from stages.export.write import export

_EXAMPLES = """examples:
  python -m stages.export models:/athanor-aligned@champion --to ./my-model --dtype bf16
  python -m stages.export models:/athanor-sft/3 --to ./my-adapter --adapter
  python -m stages.export file:///data/store/artifacts/dpo-model/<fingerprint> --push my-team/my-model
"""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[console])
    logging.getLogger("stages.export").setLevel(logging.INFO)
    try:
        made = export(
            ExportRequest(
                address=options.model,
                to=Path(options.to).expanduser() if options.to else None,
                adapter=options.adapter,
                dtype=Dtype(options.dtype),
                gguf=options.gguf,
                converter=options.converter,
                push=options.push,
                public=options.public,
                base=options.base,
                licence=options.license,
                overwrite=options.overwrite,
            )
        )
    except StageError as error:
        sys.stderr.write(printable(f"error: {error.message}\n{error.advice}\n"))
        return 2
    except OSError as error:
        sys.stderr.write(printable(f"error: {error}\nNothing was exported.\n"))
        return 1
    if made.folder:
        sys.stdout.write(printable(f"{made.folder}: {', '.join(made.files)}\n"))
    if made.page:
        sys.stdout.write(printable(f"pushed to {made.page}\n"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stages.export",
        description="Export a model of Athanor for use elsewhere.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="models:/name@alias, models:/name/version, or the address of an artifact")
    parser.add_argument("--to", default="", metavar="FOLDER", help="folder to make")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, in peft's layout")
    parser.add_argument("--base", default="", help="with --adapter: hub id or folder of its base model")
    parser.add_argument(
        "--dtype", choices=[str(dtype) for dtype in Dtype], default=Dtype.STORED.value, help="format of the weights"
    )
    parser.add_argument(
        "--gguf", default="", metavar="TYPE", help=f"also write a GGUF file: {', '.join(GGUF_TYPES)}; needs llama.cpp"
    )
    parser.add_argument(
        "--converter", default="", metavar="PATH", help="llama.cpp's folder or its convert_hf_to_gguf.py"
    )
    parser.add_argument("--push", default="", metavar="ORG/NAME", help="push to this repository of the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository readable by everyone")
    parser.add_argument("--license", default="", metavar="ID", help="licence id for the model card, such as apache-2.0")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export, or the files of a repository"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
