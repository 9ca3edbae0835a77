"""What is on images: `python predict.py photo.png ...`, or `python predict.py model.int8.onnx photo.png ...`.

Asks model.onnx, which lies beside this file: a classifier or a detector. Needs onnxruntime, numpy and Pillow, and
nothing else.
"""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SHOWN_FROM = 0.5
"""Score from which a detection is told."""


class Model:
    """An open ONNX file that epsd wrote. `card`: what it says of itself."""

    def __init__(self, session: Any, card: dict[str, Any]) -> None:
        self.session, self.card = session, card

    def open(self, file: Any) -> Image.Image:
        """An image file, by its name or open, as it is meant to be seen, in grey or in colour."""
        picture = ImageOps.exif_transpose(Image.open(file))
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
        if picture.has_transparency_data:
            seen = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        return picture.convert("L" if self.card["image_shape"][0] == 1 else "RGB")


class Classifier(Model):
    """Images (B, C, H, W) of any size, values 0 to 255, -> probabilities (B, K)."""

    def predict(self, images: Any) -> Any:
        """The probabilities; also what MLflow calls. Raises ValueError where a pixel is no number."""
        pixels = np.asarray(images, dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("a pixel is NaN, infinite or missing: pixels are numbers, 0 to 1 or 0 to 255")
        return self.session.run(None, {"images": pixels})[0]

    def read(self, path: str) -> Any:
        """An image file as (C, H, W), values 0 to 1, as the test images were read."""
        _, height, width = self.card["image_shape"]
        picture = self.open(path)
        if height == width:  # the shorter side to its length, then the middle; else as much of the image as fits
            shorter = max((self.card.get("reading") or {}).get("resize") or 0, height)
            sides = [max(height, round(side * shorter / min(picture.size))) for side in picture.size]
            left, top = ((side - height) // 2 for side in sides)
            picture = picture.resize(sides, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        else:
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        return scaled(picture)

    def said(self, path: str) -> str:
        """The three most probable classes."""
        shares = self.predict(self.read(path)[None])[0]
        best = shares.argsort()[::-1][:3]
        return ", ".join(f"{self.card['class_names'][place]} {shares[place]:.1%}" for place in best)


class Detector(Model):
    """A picture of any size -> boxes."""

    def predict(self, pictures: Any) -> list[dict[str, list[Any]]]:
        """What is on each of the image files in the column `image`, as bytes or in base64; also what MLflow calls."""
        return [self.find(io.BytesIO(decoded(content))) for content in pictures["image"]]

    def find(self, file: Any) -> dict[str, list[Any]]:
        """`boxes` (left, top, right, bottom in pixels), `classes`, `scores`, best first."""
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, {"images": scaled(self.open(file))}), strict=True))
        order = np.argsort(-found["scores"], kind="stable")
        classes = [self.card["detected"][label - 1] for label in found["labels"][order]]
        return {"boxes": found["boxes"][order].tolist(), "classes": classes, "scores": found["scores"][order].tolist()}

    def said(self, path: str) -> str:
        """Classes, scores and boxes."""
        found = self.find(path)
        shown = [one for one in zip(*found.values(), strict=True) if one[2] >= SHOWN_FROM]
        told = [f"{name} {score:.2f} ({', '.join(f'{side:.0f}' for side in box)})" for box, name, score in shown]
        return ", ".join(told) or f"nothing of score {SHOWN_FROM} or more"


def decoded(content: bytes) -> bytes:
    """An image file that may come in base64, which no image file is by itself: MLflow decodes some requests only."""
    try:
        return base64.b64decode(content, validate=True)
    except ValueError:
        return content


def scaled(picture: Image.Image) -> Any:
    """(C, H, W), values 0 to 1."""
    array = np.asarray(picture, dtype=np.float32)
    return np.atleast_3d(array).transpose(2, 0, 1) / 255


def opened(path: Path) -> Any:
    """The classifier or detector in an ONNX file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["card"])
    return (Detector if "detector" in card else Classifier)(session, card)


def _load_pyfunc(folder: str) -> Any:
    """How MLflow opens it."""
    if server := sys.modules.get("mlflow.pyfunc.scoring_server"):
        _blame_the_request(server)
    return opened(Path(folder) / "model.onnx")


def _blame_the_request(server: Any) -> None:
    """MLflow's server answers 500, its own fault, to what it cannot parse (JSON of 20,000 brackets): here 400."""
    answer = server.invocations

    def invocations(*request: Any) -> Any:
        try:
            return answer(*request)
        except server.MlflowException:
            raise
        except Exception as error:
            told = f"The request cannot be read: {type(error).__name__}: {error}"
            raise server.MlflowException(told, error_code=server.BAD_REQUEST) from None

    server.invocations = invocations


def main(arguments: list[str]) -> None:
    """One line for each image."""
    given = [name for name in arguments if name.endswith(".onnx")]
    model = opened(Path(given[0]) if given else Path(__file__).parent / "model.onnx")
    for path in arguments[len(given) :]:
        print(f"{path}: {model.said(path)}")


if __name__ == "__main__":
    main(sys.argv[1:])
