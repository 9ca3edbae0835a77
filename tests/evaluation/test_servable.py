"""Pixels in, probabilities out: the same numbers as evaluation gives, for arrays of any size and files of any kind."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from epsd.data.sampling import Normalise
from epsd.evaluation.intake import Answer, Intake, ServingError, answers, find_images
from epsd.evaluation.servable import Servable, asking, example
from epsd.files.images import ImageError, fit, pixels
from pictures import picture, write
from toys import convnet

GREY = Intake(["a", "b", "c"], (1, 4, 4), [0.3], [0.2])
COLOUR = Intake(["a", "b"], (3, 32, 32), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], size=32, resize=36)


def flat(intake: Intake) -> nn.Module:
    """A network that shows each pixel that it is fed: logits are a fixed projection of them."""
    torch.manual_seed(0)
    channels, height, width = intake.image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, len(intake.class_names)))


def images(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


# --- the module -----------------------------------------------------------------------------------------------------


def test_own_size_is_fed_as_in_evaluation() -> None:
    """The reference is the normalisation of the data path, batch norm in evaluation mode included."""
    network, batch = convnet(), images(5, 4, 4, 1)
    served = Servable(network.train(), GREY)
    normalised = Normalise(GREY.mean, GREY.std, torch.device("cpu"))(batch)
    with torch.no_grad():
        expected = network.eval()(normalised).softmax(1)
        torch.testing.assert_close(served(batch.float()), expected)
        torch.testing.assert_close(served(batch), expected)
        torch.testing.assert_close(served(batch / 255), expected)


@pytest.mark.parametrize("shape", [(100, 133), (36, 36), (50, 37), (20, 64), (33, 32)])
def test_other_sizes_are_resized_and_cut_as_files_are(shape: tuple[int, int]) -> None:
    """Against Pillow, which rounds a level differently here and there."""
    batch = images(2, *shape)
    fitted = Servable(flat(COLOUR), COLOUR)._fitted(batch)
    for image, mine in zip(batch, fitted, strict=True):
        reference = pixels(fit(Image.fromarray(image.permute(1, 2, 0).numpy()), 32, 36))
        assert np.abs(reference.astype(int) - mine.numpy()).max() <= 1


def test_a_network_for_oblong_images_takes_any_size() -> None:
    oblong = Intake(["a", "b"], (3, 20, 30), [0.5] * 3, [0.2] * 3)
    served = Servable(flat(oblong), oblong)
    own = images(2, 20, 30)
    assert torch.equal(served._fitted(own), own)
    assert served(images(3, 90, 50).float()).shape == (3, 2)


def test_the_example_is_small_and_looks_the_same() -> None:
    large = images(2, 224, 112).numpy()
    small = example(large)
    assert small.shape == (2, 3, 64, 32) and small.dtype == np.float32
    assert abs(small.mean() - large.mean()) < 2
    assert np.array_equal(example(large[:, :, :8, :8]), large[:, :, :8, :8])


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_become_what_evaluation_sees(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": picture(1, (70, 50), "JPEG"), "b.png": picture(2, 32), "c.gif": picture(3, 40, "GIF")})
    for path in find_images([str(tmp_path)]):
        read = COLOUR.read(path)
        assert np.array_equal(read, pixels(fit(Image.open(path).convert("RGB"), 32, 36)))
    assert GREY.read(tmp_path / "a.jpg").shape == (1, 4, 4)
    exact = Intake(["a", "b"], (3, 50, 70), [0.5] * 3, [0.2] * 3)
    assert np.array_equal(exact.read(tmp_path / "a.jpg"), pixels(Image.open(tmp_path / "a.jpg")))
    assert exact.read(tmp_path / "b.png").shape == (3, 50, 70)


def test_answers_are_the_most_probable_first(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.png": picture(i, 32) for i in range(70)})
    paths = find_images([str(tmp_path / "7.png"), str(tmp_path)])
    assert len(paths) == 71 and paths[0].name == "7.png"
    served = Servable(flat(COLOUR), COLOUR)
    given = list(answers(asking(served), COLOUR, paths, top=5))
    assert [answer.image for answer in given] == [str(path) for path in paths]
    for answer in given:
        shares = [share for _, share in answer.predictions]
        assert sorted(shares, reverse=True) == shares and sum(shares) == pytest.approx(1)
        assert {name for name, _ in answer.predictions} == {"a", "b"}
    assert [len(answer.predictions) for answer in answers(asking(served), COLOUR, paths[:2], top=1)] == [1, 1]


def test_files_that_cannot_be_read_keep_no_other_from_its_answer(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:02}.png": b"broken" if i in (1, 3, 5, 7) else picture(i, 32) for i in range(70)})
    served, given = Servable(flat(COLOUR), COLOUR), []
    with pytest.raises(ImageError, match=r"^4 of 70 images cannot be read: \S*01\.png: .*05\.png: .* \.\.\.$"):
        for answer in answers(asking(served), COLOUR, find_images([str(tmp_path)]), top=1):
            given.append(answer.image)
    assert len(given) == 66
    with pytest.raises(ImageError, match=r"^\S*01\.png: "):
        list(answers(asking(served), COLOUR, [tmp_path / "01.png"], top=1))


def test_nearly_black_files_are_read_as_what_they_are(tmp_path: Path) -> None:
    """Not as if their levels 0 and 1 stood for black and white."""
    paths = []
    for name, brightest in (("black", 0), ("one", 1), ("two", 2), ("white", 255)):
        paths.append(tmp_path / f"{name}.png")
        values = np.zeros((32, 32, 3), dtype=np.uint8)
        values[::2] = brightest
        Image.fromarray(values).save(paths[-1])
    served = Servable(flat(COLOUR), COLOUR)
    given = [dict(answer.predictions) for answer in answers(asking(served), COLOUR, paths, top=2)]
    normalise = Normalise(COLOUR.mean, COLOUR.std, torch.device("cpu"))
    images = normalise(torch.from_numpy(np.stack([COLOUR.read(path) for path in paths])))
    expected = served.network(images).softmax(1)
    for answer, shares in zip(given, expected, strict=True):
        assert [answer[name] for name in COLOUR.class_names] == pytest.approx(shares.tolist(), abs=1e-6)


def test_a_file_name_that_is_no_text_is_shown_all_the_same() -> None:
    answer = Answer(os.fsdecode(b"caf\xe9.png"), [("cat", 1.0)])
    assert answer.line().encode() == b"caf\\udce9.png: cat 100.0%"
    assert json.loads(answer.as_json().encode())["image"] == answer.image


def test_an_answer_is_read_by_people_and_programs() -> None:
    answer = Answer("x.png", [("cat", 0.75), ("Elch", 0.25)])
    assert answer.line() == "x.png: cat 75.0%, Elch 25.0%"
    assert json.loads(answer.as_json())["predictions"][0] == {"class": "cat", "probability": 0.75}


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(picture(1)[:40])
    with pytest.raises(ServingError, match=r"nowhere\.png: no such image"):
        find_images([str(tmp_path / "nowhere.png")])
    with pytest.raises(ServingError, match="no image in this folder"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(ImageError, match=r"broken\.png"):
        COLOUR.read(tmp_path / "broken.png")
    with pytest.raises(ImageError, match="no regular file"):
        COLOUR.read(tmp_path / "empty")
    with pytest.raises(ServingError, match="class_names"):
        Intake.of({"image_shape": [1, 4, 4]})
