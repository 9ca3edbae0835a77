"""How large the weights are that scores keep: their mean square as a share of their layer's, layer by layer.

    python benchmarks/kept_weights.py --preset cifar10-quick --images cifar10.zip --set data.limit=500 [--write FILE]

Nothing is trained: the masks of `prune` with the preset's settings, but global and not rescaled, of each score, on the
network of the preset's seed.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from comparison import base, data
from epsd.pipeline.prune import pruned
from epsd.project.params import parse
from epsd.project.runtime import versions
from page import of_preset, options, show

SCORES = (
    {"name": "epsd"},
    {"name": "prospr"},
    {"name": "snip"},
    {"name": "random", "distribution": "erk"},
)


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    """A line per layer: for each score the density, and mean square of what is kept / of the layer."""
    tree = base(arguments)
    tree["prune"] |= {"scope": "global", "channel_cap": None, "rescale": False}  # what a score keeps by itself
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = data(tree, Path(folder))
        for score in SCORES:
            tree["prune"]["score"] = dict(score)
            result = pruned(parse(tree), prepared)
            weights = dict(result.model.named_parameters())
            for name, keep in result.mask.keep.items():
                squares = weights[name].detach().square()
                share = float(squares[keep].mean() / squares.mean()) if keep.any() else float("nan")
                found.setdefault(name, {})[str(score["name"])] = (float(keep.float().mean()), share)
    here = versions()
    asked = f"sparsity {tree['prune']['sparsity']:g}, seed {tree['seed']}"
    yield f"Preset {arguments.preset}, {asked}; torch {here['torch']}, {here['cpu']}."
    yield ""
    names = [str(score["name"]) for score in SCORES]
    yield f"| layer | {' | '.join(f'{name}, density | mean square' for name in names)} |"
    yield f"|---|{'---:|---:|' * len(names)}"
    for layer, by in found.items():
        yield f"| {layer} | {' | '.join(f'{by[name][0]:.3f} | {by[name][1]:.2f}' for name in names)} |"


def main() -> None:
    """Print the table; keep it where asked."""
    parser = options(__doc__)
    of_preset(parser, "cifar10-quick")
    arguments = parser.parse_args()
    show(rows(arguments), arguments.write)


if __name__ == "__main__":
    main()
