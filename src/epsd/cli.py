"""`epsd ...`: what make, dvc and mlflow do not cover. Thin: each command calls one module, imported when it is run."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

from epsd.project.processes import Stopped, one_line, stops

T = TypeVar("T")
Command = Callable[[argparse.Namespace], int | None]


def preset(arguments: argparse.Namespace) -> None:
    """List, show or apply a preset."""
    from epsd.project import presets
    from epsd.registry import ParamsError

    if arguments.apply and arguments.name is None:
        raise ParamsError(f"preset: --apply needs a NAME. Valid: {', '.join(presets.names())}.")
    if arguments.list or arguments.name is None:
        for name in presets.names():
            print(f"{name:27}{presets.summary(name)}")
    elif arguments.apply:
        target = presets.current()
        copy = presets.apply(arguments.name, target)
        print(
            f"{os.path.relpath(target)} is now the preset '{arguments.name}'."
            + (f" What was there: {copy}" if copy else "")
        )
        print("Next: dvc repro")
    else:
        print(presets.whole(arguments.name), end="")


def tune(arguments: argparse.Namespace) -> int:
    """Search, show, apply, export."""
    from pathlib import Path

    from epsd.tuning.search import command

    export = None if arguments.export is None else Path(arguments.export)
    return command(arguments.trials, arguments.workers, arguments.resume, arguments.apply, export)


def check(arguments: argparse.Namespace) -> int:
    """Check params.yaml, the section tune included, and study files."""
    from epsd.pipeline import stage
    from epsd.project.params import load
    from epsd.tuning.space import Space

    params = stage.check(load())
    Space(params, alone=True)
    if arguments.studies:
        from epsd.studies import plan

        for name in arguments.studies:
            plan.load(plan.find(name))
    return stage.reread(params) if arguments.reread else 0


def compare(arguments: argparse.Namespace) -> None:
    """A table over recorded runs."""
    from pathlib import Path

    from epsd.comparison.command import Request, command

    def draw(runs: Any, file: Path) -> None:
        from epsd.figures import deployed  # which needs torch

        deployed.draw(runs, file)

    out, figure = (None if name is None else Path(name) for name in (arguments.out, arguments.figure))
    where, chosen = tuple(arguments.where), tuple(arguments.experiments)
    about = arguments.metric, where, arguments.baseline, arguments.best, arguments.format
    command(Request(chosen, *about, out, figure), draw)


def report(arguments: argparse.Namespace) -> None:
    """Write recorded runs as a page."""
    from pathlib import Path

    from epsd.comparison.command import Request
    from epsd.figures import page

    request = Request(tuple(arguments.experiments), where=tuple(arguments.where))
    print(page.write(page.Report(request, Path(arguments.out))))


def study(arguments: argparse.Namespace) -> int:
    """Train a grid and compare."""
    from epsd.studies.run import command

    return command(arguments.file, arguments.workers, arguments.minutes, arguments.list, arguments.storage)


def analyse(arguments: argparse.Namespace) -> int:
    """Compare prunings in depth."""
    from epsd.analysis.command import DEFAULT, Request, command

    others = DEFAULT if arguments.others is None else tuple(filter(None, arguments.others.split(",")))
    return command(Request(others, arguments.epochs, arguments.seeds, arguments.points))


def predict(arguments: argparse.Namespace) -> None:
    """Ask a model about images."""
    from epsd.pipeline.predict import predicted

    for line in predicted(arguments.images, arguments.model, arguments.top, arguments.json):
        print(line, flush=True)


def detect(arguments: argparse.Namespace) -> None:
    """Ask a detector about pictures."""
    from pathlib import Path

    from epsd.pipeline.detect import Options, detected

    out = None if arguments.out is None else Path(arguments.out)
    for line in detected(arguments.images, arguments.model, Options(arguments.threshold, out, arguments.json)):
        print(line, flush=True)


def export(arguments: argparse.Namespace) -> None:
    """Write a model's deployable folder."""
    from pathlib import Path

    from epsd.pipeline.hand_over import hand_over

    print(f"{arguments.to}: {', '.join(hand_over(arguments.model, Path(arguments.to)))}")
    print(f"Next: python {arguments.to}/predict.py photo.png (needs onnxruntime, numpy and Pillow)")


def promote(arguments: argparse.Namespace) -> None:
    """Make the model of a run the champion."""
    from epsd.tracking import registered
    from epsd.tracking.models import DETECTOR, NAME

    made = registered.promote(arguments.run, DETECTOR if arguments.detector else NAME)
    of = f", trained on {made.dataset}" if made.dataset else ""
    print(f"Version {made.number} of the model '{made.name}', of run '{made.run_name}'{of}, is now the champion.")
    serve, ask = (f" MODEL=models:/{DETECTOR}@champion", "detect") if made.name == DETECTOR else ("", "predict")
    print(f"Next: make serve{serve}, or epsd {ask} --model champion IMAGE")


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) <= 1:
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1")


def _number(kind: Callable[[str], T], fits: Callable[[T], bool], what: str) -> Callable[[str], T]:
    """A type for argparse: what `kind` makes of an argument, where it `fits`."""

    def read(text: str) -> T:
        with contextlib.suppress(ValueError):
            if fits(number := kind(text)):
                return number
        raise argparse.ArgumentTypeError(f"'{text}' is no {what}")

    return read


_positive = _number(float, lambda number: number > 0, "number above 0")
_count = _number(int, lambda number: number >= 1, "whole number from 1 on")
_trial = _number(int, lambda number: number >= 0, "number of a trial: these count from 0")


def init(arguments: argparse.Namespace) -> None:
    """Write a project for whoever has no clone."""
    from pathlib import Path

    from epsd.project import new

    new.init(Path(arguments.folder))
    print(f"{arguments.folder} is a project of epsd.\nNext: cd {arguments.folder} && dvc repro")


def doctor(arguments: argparse.Namespace) -> int:
    """Say what is here, what works, what is stale; 1 where somebody should look."""
    from epsd.pipeline.doctor import findings

    fine = True
    for finding in findings():
        print(f"{'' if finding.fine else '! '}{finding.about}: {finding.said}", flush=True)
        fine = fine and finding.fine
    return 0 if fine else 1


def completion(arguments: argparse.Namespace) -> None:
    """Print a shell's completion of these commands."""
    import shtab

    print(shtab.complete(parser(), arguments.shell))


def guide(arguments: argparse.Namespace) -> None:
    """Without a command: what makes sense here next."""
    from epsd.pipeline.doctor import next_steps

    steps = list(next_steps())
    width = max(len(command) for command, _ in steps)
    for command, does in steps:
        print(f"{command:{width}}   {does}")
    print("\nepsd --help lists every command.")


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(
        prog="epsd",
        description="Early pruning with self-distillation. Without a command: what makes sense here next.",
        epilog="Exit status: 0 done, 1 a mistake in one line, 2 unknown arguments, 130 and 143 stopped by a signal.",
    )
    top.add_argument("--version", action="version", version=f"epsd {version('epsd')}")
    top.set_defaults(command=guide, quiet=False)
    commands = top.add_subparsers(metavar="COMMAND")

    one = commands.add_parser("preset", help="parameter files for the field's benchmarks: list, show, apply")
    one.add_argument("name", nargs="?", metavar="NAME", help="the preset to show or apply")
    one.add_argument("--list", action="store_true", help="one line for each (also without NAME)")
    one.add_argument("--apply", action="store_true", help="make it the current params.yaml; a copy is kept")
    one.set_defaults(command=preset)

    one = commands.add_parser(
        "check", help="params.yaml, its section tune, and study files: every name, type and range"
    )
    one.add_argument("studies", nargs="*", metavar="STUDY", help="study files, or names of shipped ones")
    one.add_argument("--reread", action="store_true", help="then run prepare again where its images have changed")
    one.set_defaults(command=check)

    one = commands.add_parser("tune", help="search for better parameters, as the section tune of params.yaml says")
    one.add_argument("--trials", type=_count, metavar="N", help="trials in all, instead of tune.trials")
    one.add_argument("--workers", type=_count, metavar="N", help="processes here, instead of tune.workers")
    one.add_argument("--resume", action="store_true", help="go on with the study of this name, or join in")
    one.add_argument(
        "--apply",
        type=_trial,
        nargs="?",
        const=-1,
        metavar="TRIAL",
        help="write a trial (or the best) into params.yaml",
    )
    one.add_argument("--export", metavar="FILE", help="write all trials as CSV")
    one.set_defaults(command=tune)
    _comparisons(commands)
    _analysis(commands)
    _models(commands)
    _folder(commands)
    for name, one in commands.choices.items():
        said = "mistakes only; results are in files" if name == "study" else "results and mistakes only, no progress"
        one.add_argument("--quiet", action="store_true", help=said)
    return top


def _which_runs(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="MLflow experiments (default: tracking.experiment)"
    )
    one.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FILTER",
        help="key=value (prune.sparsity=0.9, study=digits) or MLflow's language; all must hold",
    )


def _comparisons(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = commands.add_parser("report", help="recorded runs as one page of HTML: tables, figures, pictures, commands")
    _which_runs(one)
    one.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    one.set_defaults(command=report)

    one = commands.add_parser("compare", help="recorded runs as a table: mean and spread over seeds, by sparsity")
    _which_runs(one)
    one.add_argument("--metric", default="test/top1", metavar="NAME", help="any logged metric (default: test/top1)")
    one.add_argument("--baseline", metavar="METHOD", help="test against this row: random, or random+cskd for all")
    one.add_argument("--best", action="store_true", help="mark the best of each column and what equals it")
    one.add_argument("--format", choices=["terminal", "markdown", "csv", "latex"], help="default: by FILE's ending")
    one.add_argument("--out", metavar="FILE", help="write the table there (.md, .csv, .tex) instead of printing it")
    one.add_argument("--figure", metavar="FILE", help="also draw accuracy against latency and size, as a .png")
    one.set_defaults(command=compare)

    one = commands.add_parser("study", help="train a grid of scores, objectives, sparsities, seeds, and compare")
    one.add_argument("file", metavar="FILE", help="a study file, or the name of a shipped one (presets/studies)")
    one.add_argument("--workers", type=_count, default=1, metavar="N", help="processes, which share the cores")
    one.add_argument("--minutes", type=_positive, metavar="M", help="begin no model after this long; later: go on")
    one.add_argument("--list", action="store_true", help="only list the models, and which are done")
    one.add_argument("--storage", metavar="URL", help="a database that hands the models out to several machines")
    one.set_defaults(command=study)


def _analysis(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = commands.add_parser("analyse", help="train EPSD and simple combinations and measure why they differ")
    one.add_argument(
        "--with",
        dest="others",
        metavar="SCORES",
        help="scores of the simple combinations (default: prospr,snip,random); the objective stays the run's",
    )
    one.add_argument("--epochs", type=_count, metavar="K", help="of each training, instead of train.epochs")
    one.add_argument("--seeds", type=_count, default=1, metavar="N", help="trainings of each (default: 1)")
    one.add_argument(
        "--points",
        type=int,
        default=17,
        metavar="P",
        help="of the loss landscape along each direction, odd (default: 17); 0 = no landscape, no features",
    )
    one.set_defaults(command=analyse)


def _models(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = commands.add_parser("predict", help="ask a model what is on images")
    one.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders of them")
    one.add_argument(
        "--model",
        metavar="MODEL",
        help="champion, candidate, a run (its id, the beginning of it, its name) or a path; without it, the model "
        "trained in this folder",
    )
    one.add_argument("--top", type=_count, default=3, metavar="K", help="classes shown for each image (3)")
    one.add_argument("--json", action="store_true", help="one JSON object for each image")
    one.set_defaults(command=predict)

    one = commands.add_parser("detect", help="ask a detector what is where on pictures")
    one.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders of them")
    one.add_argument("--model", metavar="MODEL", help="as of predict; without it, the detector trained in this folder")
    one.add_argument("--out", metavar="FOLDER", help="draw the boxes into copies of the pictures, as .png")
    one.add_argument("--threshold", type=_share, default=0.5, metavar="S", help="score from which one counts (0.5)")
    one.add_argument("--json", action="store_true", help="one JSON object for each picture")
    one.set_defaults(command=detect)

    one = commands.add_parser("export", help="write a model to a folder that is asked without torch and epsd")
    one.add_argument("--to", required=True, metavar="FOLDER", help="a new folder")
    one.add_argument("--model", metavar="MODEL", help="as of predict")
    one.set_defaults(command=export)

    one = commands.add_parser("promote", help="make the registered model of a run the champion")
    one.add_argument("run", metavar="RUN", help="its id, the beginning of it, its name, or: candidate")
    one.add_argument("--detector", action="store_true", help="the run's detector, instead of its classifier")
    one.set_defaults(command=promote)


def _folder(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = commands.add_parser("init", help="write a project: parameters, pipeline, stages, presets")
    one.add_argument("folder", metavar="FOLDER", help="a new or empty one")
    one.set_defaults(command=init)

    one = commands.add_parser("doctor", help="versions, device, space, runs, speed of the deployed files, stale stages")
    one.set_defaults(command=doctor)

    one = commands.add_parser("completion", help='completion of a shell: eval "$(epsd completion bash)"')
    one.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    one.set_defaults(command=completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. A user's mistake ends with one line on stderr and status 1 (2: unknown arguments)."""
    try:
        with stops():
            arguments = parser().parse_args(argv)
            if arguments.quiet:
                os.environ["EPSD_QUIET"] = "1"
            command: Command = arguments.command
            return command(arguments) or 0
    except BrokenPipeError:  # `epsd preset NAME | head`
        sys.stderr.close()
    except Exception as error:
        if (line := one_line(error)) is None:
            raise
        print(f"epsd: {line}", file=sys.stderr)
        return 1
    except Stopped as stop:  # most commands deal with it themselves, once they are at work
        print(f"epsd: {stop}.", file=sys.stderr)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
