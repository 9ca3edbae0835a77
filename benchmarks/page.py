"""How the benchmarks are asked, and what they leave: a page of Markdown, printed as it comes and kept with --write."""

import argparse
from collections.abc import Iterable
from pathlib import Path


def options(about: str | None) -> argparse.ArgumentParser:
    """A parser with `--write`. `about`: the docstring of the script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the page there")
    return parser


def of_preset(parser: argparse.ArgumentParser, default: str) -> None:
    """Options for a benchmark that trains by a preset."""
    parser.add_argument("--preset", default=default)
    parser.add_argument("--images", type=Path, help="folder or archive of images instead of the preset's data set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the preset")


def show(lines: Iterable[str], path: Path | None) -> None:
    """Print each line at once; keep all of them at `path`."""
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    if path:
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
