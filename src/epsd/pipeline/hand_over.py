"""Write what it takes to ask a model elsewhere: `epsd export`."""

import shutil
from pathlib import Path

from epsd.evaluation.intake import ServingError
from epsd.files.onnx_file import FP32, INT8, SCRIPT, OnnxFile
from epsd.pipeline.place import inside, is_detector, onnx_at, place_of
from epsd.project import artifacts


def hand_over(model: str | None, folder: Path) -> list[str]:
    """Write what it takes to ask a model elsewhere to a new `folder`: its ONNX files, or one made of its weights, the
    names of its classes, its card, and a script that needs onnxruntime, numpy and Pillow. Returns the files' names.

    Raises ArtifactError where `folder` is there already or cannot be written, EpsdError as `opened` does.
    """
    place = place_of(model)
    with artifacts.new_folder(folder) as made:
        _copy_or_make(place, made)
        card = OnnxFile(made / FP32).card
        artifacts.write_text(
            made / "class_names.txt", "\n".join([*card["detected" if is_detector(card) else "class_names"], ""])
        )
        artifacts.write_json(made / artifacts.MODEL_CARD.name, card)
        for path in (SCRIPT, place / "extra_files" / artifacts.MODEL_README.name):
            if path.is_file():
                shutil.copyfile(path, made / path.name)
        return sorted(path.name for path in made.iterdir())


def _copy_or_make(place: Path, made: Path) -> None:
    if path := onnx_at(place):
        beside = [] if path == place else [path.with_name(INT8)]
        for source, name in ((path, FP32), *((other, other.name) for other in beside if other.is_file())):
            shutil.copyfile(source, made / name)
        return
    if (place / "MLmodel").is_file():
        raise ServingError(
            f"{place}: this model has no ONNX file. evaluate makes one where evaluate.export.onnx is true."
        )
    from epsd.detection import deploy as detectors
    from epsd.pipeline import deploy
    from epsd.pipeline.load import network_at

    weights = place if place.is_file() else inside(place)
    network, card = network_at(weights)
    export = detectors.exported if is_detector(card) else deploy.export
    export(network.eval(), card, weights, made / FP32)
