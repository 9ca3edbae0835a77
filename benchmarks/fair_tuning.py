"""The same budget of `epsd tune` for each score's own settings at 98 %, then a study of what it found on unseen seeds.

    python benchmarks/fair_tuning.py --trials 20            # a search for each score; then writes tuned.yaml
    epsd study .epsd/fair-tuning/tuned.yaml                 # shipped and tuned settings on 20 fresh seeds

Each search is judged on validation by the mean over seeds (`race`), begins with the shipped settings, and has the same
trials, the same training, and the same space as far as its score has the settings. The study takes seeds from
`--first-seed` on, which no search has used, and reads the test split once for each model, as every study does.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from epsd.project.params import flatten, load, read_yaml
from epsd.tuning.space import Space

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tuning import ROOT, found, project, search

SCORES = ("epsd", "prospr", "snip")
SPACE: dict[str, dict[str, Any]] = {
    "prune.score.steps": {"int": [1, 6]},
    "prune.score.lr": {"float": [0.01, 1.0], "log": True},
    "prune.batch_size": {"choice": [64, 128, 256]},
    "prune.rounds": {"choice": [1, 5, 20]},
    "prune.scope": {"choice": ["global", "erk", "lamp"]},
    "prune.channel_cap": {"choice": [None, 1.0, 1.5, 3.0]},
}
TRAINING = {"prune.sparsity": 0.98, "train.epochs": 20, "prune.compare": False}


def shipped(score: str) -> dict[str, Any]:
    """The score with the shipped settings where it has them: those of EPSD are ProsPr's."""
    own = read_yaml(ROOT / "params.yaml")["prune"]["score"]
    return {"name": score} if score == "snip" else {**own, "name": score}


def changes(score: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What differs from the shipped params.yaml while `score` is tuned."""
    own = shipped(score)
    known = [key for key in SPACE if not key.startswith("prune.score.") or key.removeprefix("prune.score.") in own]
    return {
        **TRAINING,
        "prune.score": own,
        "tune.study": f"fair-{score}",
        "tune.trials": arguments.trials,
        "tune.repeats": arguments.repeats,
        "tune.workers": arguments.workers,
        "tune.fixed": {},
        "tune.space": {key: SPACE[key] for key in known},
    }


def tuned(folder: Path, score: str) -> dict[str, Any]:
    """A variant of a study with the best trial's settings."""
    params = load(folder / "params.yaml")
    best = found(folder, params)[1]
    flat = dict(flatten(Space(params).tree(best.params)))
    settings = {key: flat[key] for key in params.tune.space if not key.startswith("prune.score.")}
    own = {key.removeprefix("prune.score."): value for key, value in flat.items() if key.startswith("prune.score.")}
    return {"name": f"{score} tuned", "set": {"prune.score": own, **settings}}


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """The study file."""
    variants = [tuned(arguments.folder / score, score) for score in SCORES]
    return {
        "name": "high-sparsity-tuned",
        "base": "digits",
        "set": TRAINING,
        "scores": [*SCORES],
        "variants": [
            {"name": "random erk", "set": {"prune.score": {"name": "random", "distribution": "erk"}}},
            *variants,
        ],
        "objectives": ["cskd"],
        "sparsities": [TRAINING["prune.sparsity"]],
        "seeds": list(range(arguments.first_seed, arguments.first_seed + arguments.seeds)),
        "baseline": "random erk",
    }


def main() -> None:
    """Search for each score what is not searched yet; write the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".epsd" / "fair-tuning", help="keeps what is done")
    parser.add_argument("--trials", type=int, default=20, help="of each search")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of a trial, 2 or more")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=100, help="of the study")
    parser.add_argument("--seeds", type=int, default=20, help="of the study")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    for score in SCORES:
        folder = arguments.folder / score
        if not (folder / "search.json").exists():
            if not (folder / "params.yaml").exists():
                project(folder, 0, changes(score, arguments))
            search(folder, resume=(folder / "mlruns").exists())
    with (arguments.folder / "tuned.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(study(arguments), file)
    print(f"epsd study {arguments.folder / 'tuned.yaml'}")


if __name__ == "__main__":
    main()
