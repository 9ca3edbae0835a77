"""What a run of a trained model says about itself: name, tags, plain words. For the stages and for cells of a study."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from epsd.data.prepared import Prepared
from epsd.project import artifacts
from epsd.project.params import Params, PruneParams, flatten
from epsd.tracking import Tracker, new_id, track
from epsd.types import EpsdError


def method(params: Params) -> str:
    """Score and control, `dense` where nothing is removed: `epsd`, `epsd-shuffled`, `dense`. From given weights
    `epsd-transferred`, `transferred` where the mask is theirs.
    """
    narrow = params.prune.structure == "channels"
    control = "" if params.prune.control == "none" else f"-{params.prune.control}"
    if params.start.mask == "keep":
        return f"transferred{control}"
    given = "" if params.start.weights is None else "-transferred"
    if is_dense(params):
        return f"dense{given}"
    return f"{params.prune.score['name']}{f'-channels-{params.prune.allocation}' if narrow else ''}{control}{given}"


def is_dense(params: Params) -> bool:
    """Whether nothing is removed."""
    return params.prune.sparsity == 0 and params.prune.structure == "weights" and params.start.mask == "new"


def removal(params: Params) -> str:
    """How much goes, for names: `s0.95`, `macs0.25`, both; `kept` where weights brought their mask."""
    if params.start.mask == "keep":
        return "kept"
    share = f"s{params.prune.sparsity:g}"
    if params.prune.structure == "weights":
        return share
    macs, asked = params.prune.macs, params.prune.budget()
    narrow = f"macs{macs:g}" if macs != "auto" else "-".join(f"{name}{most:.10g}" for name, most in asked.items())
    return narrow + (f"-{share}" if params.prune.sparsity else "")


def stays(prune: PruneParams) -> str:
    """How many of the multiply-adds stay where channels go: `25.0% of its multiply-adds`, or what they may cost."""
    if prune.macs != "auto":
        return f"{prune.macs:.1%} of its multiply-adds"
    units = {"latency_ms": "ms for an image", "bytes": "bytes of ONNX"}
    return "what " + " and ".join(f"{most:,.10g} {units[name]}" for name, most in prune.budget().items()) + " allow"


def run_name(params: Params, named: str = "") -> str:
    """The run's story in a few words: method (`named`, or the score), objective, sparsity, seed, data. What differs
    between the runs of an experiment comes first: a narrow column shows no more.
    """
    return (
        f"{(named or method(params)).replace(' ', '_')}-{params.objective['name']}-{removal(params)}"
        f"-seed{params.seed}-{params.data_title}"
    )


def tags(params: Params, data: Prepared, kind: str = "pipeline") -> dict[str, Any]:
    """What runs are searched by in MLflow."""
    return {
        "kind": kind,
        "method": f"{method(params)}+{params.objective['name']}",
        "dataset": params.data_title,
        "data.digest": data.digest,
        "seed": params.seed,
    }


def story(params: Params, data: Prepared) -> str:
    """What the run was, in plain words, for its page."""
    shape = "x".join(str(size) for size in data.image_shape)
    return (
        f"A {params.architecture['name']} network for {data.num_classes} classes of `{params.data_title}` "
        f"({shape}, {data.sizes['train']} training images). {_beginning(params)}{_removal(params)} "
        f"`{params.objective['name']}` trained it for {params.train.epochs} epochs{_rounding(params)}. "
        f"Seed {params.seed}."
    )


def _beginning(params: Params) -> str:
    return "" if params.start.weights is None else f"It began with the weights of `{params.start.weights}`. "


def _rounding(params: Params) -> str:
    how = params.train.quantise
    if how is None:
        return ""
    return f", its weights rounded to {how.bits} bits" + (f" after {how.from_epoch} of them" if how.from_epoch else "")


def _removal(params: Params) -> str:
    prune = params.prune
    if params.start.mask == "keep":
        return "It kept the mask and the width that these came with."
    if prune.structure == "channels":
        return _narrowing(params)
    if prune.sparsity == 0:
        return "Dense: it keeps all of its weights."
    share, score = f"{prune.sparsity:.1%}", f"`{prune.score['name']}`"
    told = {
        "none": f"{score} removed {share} of its weights before training.",
        "shuffled": f"A control: {share} of its weights were removed before training, in each layer as many as {score} "
        "would have removed, but others, drawn at random.",
        "reinitialised": f"A control: {score} removed {share} of its weights before training; those that stayed were "
        "drawn anew.",
    }[prune.control]
    return told + (" In each layer they were scaled to the mean square it began with." if prune.rescale else "")


def _narrowing(params: Params) -> str:
    prune = params.prune
    lots = prune.allocation == "random" or prune.control == "shuffled"
    which = "drawn by lot" if lots else f"chosen by the gates of `{prune.score['name']}`"
    zeros = f" Then {prune.sparsity:.1%} of its weights were removed." if prune.sparsity else ""
    anew = " Its weights were drawn anew." if prune.control == "reinitialised" else ""
    return (
        f"Its channels, {which}, were cut to {stays(prune)} before training "
        f"(allocation {prune.allocation}).{zeros}{anew}"
    )


def opened(
    stage: str, params: Params, tags: dict[str, Any], used: Mapping[str, Any] = MappingProxyType({})
) -> contextlib.AbstractContextManager[Tracker]:
    """A session of `detect` in a run of its own, on a network that this folder did not train.

    used : what stands for `auto`, by name.
    """
    return track(
        stage,
        experiment=params.tracking.experiment,
        name=f"{params.scenes_title}-{params.detect.detector['name']}-seed{params.seed}",
        params=dict(flatten(params.model_dump())) | dict(used),
        tags={"kind": "detector", "dataset": params.scenes_title, "seed": params.seed} | tags,
        description=f"A detector on the network of `{params.detect.backbone}`.",
    )


def begun(folder: Path) -> str:
    """The id of the run of the training whose checkpoints are in `folder`; noted there before the run is opened."""
    note = folder / "run.json"
    if not note.exists():
        artifacts.write_json(note, {"run_id": new_id(opened_here=True)})
    return artifacts.read_run(note).run_id


@contextlib.contextmanager
def reopened(
    stage: str, params: Params, tags: dict[str, Any], used: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Tracker]:
    """A session of a later stage in the run that `train` opened; whole again where that is no more in the store.

    used : what stands for `auto`, by name.
    """
    run = artifacts.read_run(artifacts.RUN)
    with track(
        stage,
        experiment=params.tracking.experiment,
        name=run.name or stage,
        run_id=run.run_id,
        params=dict(flatten(params.model_dump())) | dict(used),
        tags=run.tags | tags,
        description=run.description,
    ) as tracker:
        with contextlib.suppress(EpsdError):  # detect runs without the curves of the training
            history = artifacts.read_history(run)
            tracker.curves(dict(zip(history, row, strict=True)) for row in zip(*history.values(), strict=True))
        yield tracker
