"""The model card: one page of Markdown that goes with a trained network wherever it is handed on."""

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from epsd.compute import timing
from epsd.evaluation.evaluate import ClassRow
from epsd.project.artifacts import Run
from epsd.project.params import flatten

_LISTED_CLASSES = 20
_WEAKEST = 5
_OTHERS = ("device", "evaluate", "voc", "detect", "tracking")
"""Sections of params.yaml that did not make the network."""

_DIGITS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "balanced_accuracy": "balanced accuracy (mean recall of the classes)",
    "macro_f1": "macro F1",
    "nll": "NLL (nats)",
    "ece": "ECE",
}
_COST = {
    "parameters": ("parameters", ",.0f"),
    "parameters_nonzero": ("of these not zero", ",.0f"),
    "macs": ("share of the multiply-adds of the network before channels went", ".3f"),
    "compression": ("all parameters / nonzero ones", ".1f"),
    "sparsity": ("share of prunable weights that are zero", ".4f"),
    "gflops_dense": ("GFLOPs of one image, zeros counted", ".4g"),
    "gflops_sparse": ("GFLOPs of one image, zeros skipped", ".4g"),
    "bytes_dense": ("bytes of the weights", ",.0f"),
    "bytes_sparse": ("bytes of the compact file", ",.0f"),
}

FORMS = {
    "torch": "torch",
    "onnx": "ONNX fp32",
    "int8": "ONNX int8",
    "dense_torch": "dense twin, torch",
    "dense_onnx": "dense twin, ONNX fp32",
}
"""Forms in which a network runs, as their figures are named and as a reader knows them."""


class Subject(NamedTuple):
    """What a card is about. `params`: params.yaml as nested mappings. `data`: data.json of `prepare`. `story`: the run
    in plain words. `run`: as MLflow knows it. `report`: the figures of evaluate by group. `classes`: one row each.
    `deployed`: what became of the files that are deployed. `machine`: the processor on which latency was measured.
    """

    params: Mapping[str, Any]
    data: Mapping[str, Any]
    story: str
    run: Run
    report: Mapping[str, Mapping[str, float]]
    classes: Sequence[ClassRow]
    deployed: str = ""
    machine: str = ""


def model_card(subject: Subject) -> str:
    """Data, method, parameters, metrics, limits and how to load, as Markdown."""
    sections = {
        "Data": _data(subject),
        "Method": _method(subject.params),
        "Metrics": _metrics(subject),
        "Deployed": [*_forms(subject), *_latency(subject)],
        "Limits": _limits(subject),
        "How to use it": _use(subject),
        "Parameters": _parameters(subject.params),
    }
    written = {title: list(lines) for title, lines in sections.items()}
    body = "\n\n".join("\n".join([f"## {title}", "", *lines]) for title, lines in written.items() if lines)
    return f"# {escaped(subject.run.name or 'Model')}\n\n{subject.story}\n\n{body}\n"


def escaped(text: str) -> str:
    """A name or path in Markdown as it stands: no markup, no HTML, one line."""
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def results(report: Mapping[str, Mapping[str, float]], images: int) -> str:
    """One sentence with the headline figures."""
    test, model = report["test"], report["model"]
    judged = f"Top-1 accuracy {test['top1']:.4f} on {images} test images, ECE {test['ece']:.4f}"
    cut = f"cut to {model['macs']:.1%} of its multiply-adds, " if "macs" in model else ""
    if model["sparsity"] == 0:
        return f"{judged}; {cut or 'dense, '}{model['parameters']:,.0f} parameters."
    return (
        f"{judged}; {cut}{model['sparsity']:.2%} of the prunable weights are zero, which leaves "
        f"{model['parameters_nonzero']:,.0f} of {model['parameters']:,.0f} parameters "
        f"({model['compression']:.1f} times fewer)."
    )


def _data(subject: Subject) -> Iterator[str]:
    data, names = subject.data, subject.data["class_names"]
    sizes = ", ".join(f"{count} {split}" for split, count in data["sizes"].items())
    shown = ", ".join(map(escaped, names[:_LISTED_CLASSES])) + (", ..." if len(names) > _LISTED_CLASSES else "")
    yield f"* Source: {escaped(data['source'])}, digest `{data['digest'][:16]}`"
    yield f"* Images: {sizes}, of {'x'.join(map(str, data['image_shape']))} pixels"
    yield f"* {len(names)} classes: {shown}"
    yield "* The test images were read once, to write this card; choices were made on validation."


def _method(tree: Mapping[str, Any]) -> Iterator[str]:
    prune, train = tree["prune"], tree["train"]
    what = "channels" if _narrow(tree) else "weights"
    if _dense(tree):
        yield "The dense network, for comparison: no weight is removed."
    elif prune["control"] != "none":
        yield f"A control ({prune['control']}): what the score chose is changed, to see whether the choice matters."
    elif prune["score"]["name"] == "epsd":
        yield f"EPSD (Chen et al., AAAI 2024): {what} are removed before training, by a score under the very loss that "
        yield "the rest is then trained with."
    else:
        yield f"Early pruning and self-distillation, one after the other: {what} are removed before training."
    yield ""
    yield f"* Architecture: {_choice(tree['architecture'])}"
    if not _dense(tree):
        how = "".join(f", {key} {prune[key]}" for key in _HOW if prune.get(key) not in (None, {}, 1, "absolute"))
        how += ", rescaled" if prune.get("rescale") else ""
        cut = "".join(f"{key} {prune[key]}, " for key in _CUT if prune.get(key) is not None) if _narrow(tree) else ""
        yield f"* Score: {_choice(prune['score'])}; {cut}sparsity {prune['sparsity']:g}, scope {prune['scope']}{how}"
    yield f"* Objective: {_choice(tree['objective'])}"
    yield f"* Training: {train['epochs']} epochs, batches of {train['batch_size']}, learning rate {train['lr']:g}"


def _dense(tree: Mapping[str, Any]) -> bool:
    return bool(tree["prune"]["sparsity"] == 0) and not _narrow(tree)


def _narrow(tree: Mapping[str, Any]) -> bool:
    return bool(tree["prune"].get("structure") == "channels")


_CUT = ("macs", "latency_ms", "bytes", "allocation", "round_to")
"""Settings by which channels go."""

_HOW = ("densities", "channel_cap", "rounds", "batches", "average")
"""Settings of the selection that are said where they change something."""


def _choice(choice: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {escaped(str(value))}" for key, value in choice.items() if key != "name")
    return f"{choice['name']} ({settings})" if settings else str(choice["name"])


def _metrics(subject: Subject) -> Iterator[str]:
    test, model = subject.report["test"], subject.report["model"]
    yield "| on the test images | |"
    yield "|---|---|"
    yield from (f"| {words} | {test[key]:.4f} |" for key, words in _DIGITS.items() if key in test)
    yield ""
    yield "| cost | |"
    yield "|---|---|"
    yield from (f"| {words} | {model[key]:{form}} |" for key, (words, form) in _COST.items() if key in model)
    weakest = sorted((row for row in subject.classes if row.recall != ""), key=lambda row: float(row.recall))
    told = [f"{escaped(row.name)} {row.recall:.1%} of {row.images}" for row in weakest[:_WEAKEST]]
    yield ""
    yield f"Weakest classes, by recall: {', '.join(told)}."


def _forms(subject: Subject) -> Iterator[str]:
    """The files, by form: how right they are, how often they agree with torch, how large they are."""
    found, test, model = subject.report.get("deploy", {}), subject.report["test"], subject.report["model"]
    if "onnx_top1" not in found:
        return
    yield f"{subject.deployed}."
    yield ""
    yield "| form | test top-1 | says what torch says | bytes |"
    yield "|---|---:|---:|---:|"
    yield f"| torch | {test['top1']:.4f} | | {model['bytes_dense']:,.0f} |"
    for form in ("onnx", "int8"):
        if f"{form}_top1" in found:
            right, same, size = (found[f"{form}_{name}"] for name in ("top1", "agreement", "bytes"))
            yield f"| {FORMS[form]} | {right:.4f} | {same:.2%} | {size:,.0f} |"
    yield ""


def _latency(subject: Subject) -> Iterator[str]:
    """Rows of forms, columns of settings."""
    found = subject.report.get("latency", {})
    cells = {named: value for name, value in found.items() if (named := timing.parts(name))}
    settings = list(dict.fromkeys(setting for _, setting, _ in cells))
    if not cells:
        return
    yield f"| ms of a pass | {' | '.join(map(timing.in_words, settings))} |"
    yield "|---|" + "---:|" * len(settings)
    for form in dict.fromkeys((*FORMS, *(form for form, _, _ in cells))):
        if any(known == form for known, _, _ in cells):
            yield f"| {FORMS.get(form, form)} | {' | '.join(_pass(cells, form, setting) for setting in settings)} |"
    yield ""
    yield "In brackets: times as fast as the dense twin in torch, and as that in ONNX fp32."
    turns, threads, others = (found[name] for name in ("turns", "threads", "load_of_others"))
    yield f"Medians of at least {turns:.0f} passes, in turns, on {subject.machine or 'a processor'}; all threads are"
    yield f"{threads:.0f}. Other processes had {others:.0%} of the machine meanwhile."


def _pass(cells: Mapping[tuple[str, str, str], float], form: str, setting: str) -> str:
    twins = [f"times_{twin}" for twin in ("dense_torch", "dense_onnx")]
    times = [f"{cells[form, setting, twin]:.2f}" for twin in twins if (form, setting, twin) in cells]
    return f"{cells[form, setting, 'ms']:.3g}" + (f" ({', '.join(times)})" if times else "")


def _limits(subject: Subject) -> Iterator[str]:
    seed, names = subject.params["seed"], subject.data["class_names"]
    yield f"* One training, seed {seed}: another seed gives other figures."
    yield f"* It answers with one of its {len(names)} classes whatever it is shown, and was measured on images like its"
    yield "  training images only."
    if subject.params["prune"]["sparsity"]:
        yield "* Zeros scattered over weight tensors make the compact file small, not dense kernels faster."
    yield f"* Its probabilities are off by {subject.report['test']['ece']:.1%} on average (ECE)."


def _use(subject: Subject) -> Iterator[str]:
    height, width = subject.data["image_shape"][1:]
    yield "```console"
    yield f"$ epsd predict --model {subject.run.run_id} photo.png"
    yield f"$ epsd export --model {subject.run.run_id} --to FOLDER     # files that need no torch"
    yield f"$ epsd promote {subject.run.run_id}     # makes it models:/epsd@champion"
    yield "$ mlflow models serve --env-manager local -p 5001 -m models:/epsd@champion"
    yield "```"
    yield ""
    yield "```python"
    yield "import mlflow"
    yield 'model = mlflow.pyfunc.load_model("models:/epsd@champion")'
    yield 'probabilities = model.predict(images.astype("float32"))'
    yield "```"
    yield ""
    yield (
        f"Input: (B, {subject.data['image_shape'][0]}, height, width) float32, values 0 to 255 (or all of an image's "
        f"within 0 to 1), not normalised: that is part of the model. Images of {height}x{width} are taken as they are, "
        "others are resized by their shorter side and cut in the middle. Output: probabilities (B, "
        f"{len(subject.data['class_names'])}) in the order of the class names, which are in the model's metadata."
    )


def _parameters(tree: Mapping[str, Any]) -> Iterator[str]:
    made = {section: content for section, content in tree.items() if section not in _OTHERS}
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in flatten(made)]
    longest = max(map(len, re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}yaml", *lines, fence)
