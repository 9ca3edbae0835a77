import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from data.test_prepared import raw, same
from epsd.compute.devices import Machine
from epsd.data.prepared import Prepared
from epsd.data.streaming import Augmentation, drawing_from
from epsd.files.archives import ArchiveError, open_tree
from epsd.files.images import ImageError, decode, pixels
from epsd.files.layouts import Reading, folder_source
from epsd.preparing.write import prepare, written_arrays
from epsd.types import Batch, Batches, BatchNeeds, EpsdError
from pictures import classes, picture, write, zipped

SIZE = 72


@pytest.fixture(params=["folder", "zip"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Prepared:
    files = classes(12, size=SIZE)
    made = (write if request.param == "folder" else zipped)(tmp_path / f"tree.{request.param}", files)
    prepare(folder_source(open_tree(made), Reading()), tmp_path / "out")
    return Prepared.load(tmp_path / "out")


def draw(data: Prepared, workers: int = 0, number: int = 1, seed: int = 0, partner: str = "same_class") -> list[Batch]:
    options = Augmentation(0, True)
    data = data.on(Machine(workers=workers))
    batches = data.batches("train", batch_size=5, seed=seed, augmentation=options, shuffle=True)
    return list(batches.epoch(number, BatchNeeds(partner)))  # type: ignore[arg-type]


def test_plain_batches_are_the_files_in_order(data: Prepared) -> None:
    batches = data.batches("test", batch_size=3)
    assert isinstance(batches, Batches)
    drawn = list(batches.epoch(0))
    assert len(drawn) == len(batches) == 2
    names = (data.folder / "test_files.json").read_text()
    tree = open_tree(Path(data.index["root"]))
    listed = [name for name in tree.names if f'"{name}"' in names]
    wanted = np.stack([pixels(decode(tree.read(name), name)) for name in listed])
    assert np.array_equal(raw(data, torch.cat([batch.images for batch in drawn])).numpy(), wanted)
    assert torch.cat([batch.labels for batch in drawn]).tolist() == data.labels("test").tolist()


@pytest.mark.parametrize("partner", ["none", "view", "same_class"])
def test_any_number_of_workers_gives_the_same_batches(data: Prepared, partner: str) -> None:
    alone = draw(data, partner=partner)
    assert same(alone, draw(data, workers=2, partner=partner))
    assert [len(batch.labels) for batch in alone] == [5, 5, 5, 3]


def test_an_epoch_depends_on_seed_and_number_alone(data: Prepared) -> None:
    one = draw(data)
    torch.manual_seed(9)
    assert same(one, draw(data))
    assert not same(one, draw(data, number=2))
    assert not same(one, draw(data, seed=1))


def test_drawing_leaves_the_global_random_states_alone(data: Prepared) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw(data)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_views_differ_and_partners_are_of_the_class(data: Prepared) -> None:
    for batch in draw(data, partner="view"):
        assert batch.partner is not None
        assert (batch.partner != batch.images).flatten(1).any(1).all()
    plain = next(data.batches("train", batch_size=18).epoch(0))
    own = next(data.batches("train", batch_size=18).epoch(0, BatchNeeds("same_class")))
    assert own.partner is not None
    for image, label in zip(own.partner, own.labels, strict=True):
        match = (plain.images == image).flatten(1).all(1)
        assert plain.labels[match].tolist() == [int(label)]


def test_augmented_images_have_the_shape_and_flips_are_as_asked(data: Prepared) -> None:
    assert all(batch.images.shape[1:] == (3, SIZE, SIZE) for batch in draw(data))


def test_an_epoch_may_be_left_early(data: Prepared) -> None:
    batches = data.on(Machine(workers=2)).batches("train", batch_size=2)
    first = next(batches.epoch(0))
    assert torch.equal(first.images, next(batches.epoch(0)).images)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_gone_or_damaged_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    root = write(tmp_path / "tree", classes(6, size=SIZE))
    prepare(folder_source(open_tree(root), Reading()), tmp_path / "out", validation=0)
    for broken, error in ((b"", ImageError), (None, ArchiveError)):
        for path in root.rglob("cat/*.png"):
            path.write_bytes(broken) if broken is not None else path.unlink()
        with pytest.raises(error, match=r"^\S*tree: .*cat/\d.png") as caught:
            list(Prepared.load(tmp_path / "out", Machine(workers=workers)).batches("train", batch_size=4).epoch(0))
        assert "\n" not in str(caught.value)
    root.rename(tmp_path / "moved")
    with pytest.raises(EpsdError, match="tree: no such folder"):
        Prepared.load(tmp_path / "out").batches("train", batch_size=4)


def test_a_file_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    """As names from other systems often are."""
    root = write(tmp_path / "tree", classes(6, size=SIZE))
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        path.rename(path.parent / os.fsdecode(b"caf\xe9-%d.png" % number))
    prepare(folder_source(open_tree(root), Reading()), tmp_path / "out", validation=0)
    batches = Prepared.load(tmp_path / "out", Machine(workers=1)).batches("train", batch_size=4)
    assert sum(len(batch.labels) for batch in batches.epoch(0)) == batches.size > 4


def test_streamed_images_are_not_held_as_arrays(data: Prepared) -> None:
    assert written_arrays(data.folder, data.index) is None
    with pytest.raises(EpsdError, match="read from files"):
        data.images("train")


def test_large_jpegs_give_the_crops_of_the_whole_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded at a fraction of their size: the same place, nearly the same pixels."""
    waves = np.sin(np.arange(800) / 37)[:, None, None] + np.cos(np.arange(1000) / 53)[None, :, None] * [1.0, 0.5, -1.0]
    content = io.BytesIO()
    Image.fromarray((127 + 60 * waves).astype(np.uint8)).save(content, "JPEG", quality=95)
    files = {f"{name}/{number}.jpg": content.getvalue() for name in "ab" for number in range(4)}
    made = write(tmp_path / "photos", files)
    prepare(folder_source(open_tree(made), Reading(size=72)), tmp_path / "out")
    batches = Prepared.load(tmp_path / "out").batches("train", batch_size=2, augmentation=Augmentation(0, True))
    sizes: list[int] = []
    load = JpegImageFile.load

    def noting(picture: JpegImageFile) -> object:
        sizes.append(picture.width)
        return load(picture)

    monkeypatch.setattr(JpegImageFile, "load", noting)
    reduced = torch.cat([batch.images for epoch in range(4) for batch in batches.epoch(epoch)])
    monkeypatch.setattr(JpegImageFile, "draft", lambda *arguments: None)
    monkeypatch.setattr(JpegImageFile, "load", None)
    whole = torch.cat([batch.images for epoch in range(4) for batch in batches.epoch(epoch)])
    assert len(sizes) > 8 and max(sizes) < 1000  # what is wanted whole goes another way
    spread = float(whole.std())
    assert 0 < float((reduced - whole).abs().mean()) < 0.03 * spread


def test_small_images_are_enlarged_to_the_asked_size(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", classes(6, size=10) | {"cat/wide.png": picture(0, (90, 20))})
    prepare(folder_source(open_tree(root), Reading(size=70, resize=80)), tmp_path / "out", validation=0)
    data = Prepared.load(tmp_path / "out")
    assert data.image_shape == (3, 70, 70)
    for options in (None, Augmentation()):
        for batch in data.batches("train", batch_size=4, augmentation=options).epoch(0):
            assert batch.images.shape[1:] == (3, 70, 70)


def test_drawing_from_seeds_all_three_and_restores_them() -> None:
    def numbers() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    before = torch.get_rng_state(), random.getstate()
    with drawing_from(1, "a"):
        one = numbers()
    with drawing_from(1, "a"):
        assert numbers() == one
    with drawing_from(1, "b"):
        assert all(a != b for a, b in zip(numbers(), one, strict=True))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    with pytest.raises(ValueError), drawing_from(1):
        raise ValueError
    assert torch.equal(before[0], torch.get_rng_state())
