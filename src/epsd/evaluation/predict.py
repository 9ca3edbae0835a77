"""What is on images: `python predict.py photo.png ...`, or `python predict.py model.int8.onnx photo.png ...`.

Asks model.onnx, which lies beside this file. Needs onnxruntime, numpy and Pillow, and nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Model:
    """An ONNX file that epsd wrote: images (B, C, H, W) of any size, values 0 to 255, -> probabilities (B, K)."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.card = json.loads(self.session.get_modelmeta().custom_metadata_map["card"])

    def predict(self, images: Any) -> Any:
        """The probabilities; also what MLflow calls. Raises ValueError where a pixel is no number."""
        pixels = np.asarray(images, dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError("a pixel is NaN, infinite or missing: pixels are numbers, 0 to 1 or 0 to 255")
        return self.session.run(None, {"images": pixels})[0]

    def read(self, path: str) -> Any:
        """An image file as (C, H, W), values 0 to 1, as the test images were read."""
        channels, height, width = self.card["image_shape"]
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
        if picture.has_transparency_data:
            seen = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if height == width:  # the shorter side to its length, then the middle; else as much of the image as fits
            shorter = max((self.card.get("reading") or {}).get("resize") or 0, height)
            sides = [max(height, round(side * shorter / min(picture.size))) for side in picture.size]
            left, top = ((side - height) // 2 for side in sides)
            picture = picture.resize(sides, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        else:
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture, dtype=np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255


def _load_pyfunc(folder: str) -> Model:
    """How MLflow opens it."""
    if server := sys.modules.get("mlflow.pyfunc.scoring_server"):
        _blame_the_request(server)
    return Model(Path(folder) / "model.onnx")


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
    model = Model(Path(given[0]) if given else Path(__file__).parent / "model.onnx")
    for path in arguments[len(given) :]:
        shares = model.predict(model.read(path)[None])[0]
        best = shares.argsort()[::-1][:3]
        print(f"{path}: " + ", ".join(f"{model.card['class_names'][place]} {shares[place]:.1%}" for place in best))


if __name__ == "__main__":
    main(sys.argv[1:])
