from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from epsd.data.in_memory import MemoryBatches, Pixels
from epsd.data.prepared import Prepared
from epsd.data.sampling import TooFewImages
from epsd.data.streaming import Augmentation
from epsd.files.archives import open_tree
from epsd.files.digests import DamagedFile, digest_of
from epsd.files.images import ImageError
from epsd.files.layouts import Reading, folder_source
from epsd.preparing.write import prepare
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.types import Batch, Batches, BatchNeeds, EpsdError
from pictures import classes, picture, write
from preparing.test_write import arrays

PARTNERS = [BatchNeeds(), BatchNeeds("view"), BatchNeeds("same_class")]


@pytest.fixture
def data(tmp_path: Path) -> Prepared:
    prepare(arrays(60, channels=3), tmp_path, validation=0.2, test=0.2)
    return Prepared.load(tmp_path)


def raw(data: Prepared, images: Tensor) -> Tensor:
    """Undo the normalisation: uint8 again."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def same(one: list[Batch], other: list[Batch]) -> bool:
    flat = [[part for batch in batches for part in batch if part is not None] for batches in (one, other)]
    return len(flat[0]) == len(flat[1]) and all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


def test_prepared_says_what_it_holds(data: Prepared) -> None:
    assert data.num_classes == 2
    assert data.class_names == ["a", "b"]
    assert data.image_shape == (3, 6, 6)
    assert data.sizes == {"train": 36, "validation": 12, "test": 12}
    assert len(data.digest) == 64
    assert data.images("train").shape == (36, 3, 6, 6)


def test_plain_batches_are_the_arrays_normalised_in_order(data: Prepared) -> None:
    batches = data.batches("test", batch_size=5)
    assert isinstance(batches, Batches)
    assert (batches.size, batches.num_classes, len(batches)) == (12, 2, 3)
    drawn = list(batches.epoch(0))
    assert [len(batch.labels) for batch in drawn] == [5, 5, 2]
    images = torch.cat([batch.images for batch in drawn])
    assert images.dtype == torch.float32
    assert all(batch.images.is_contiguous() and batch.partner is None for batch in drawn)
    wanted = data.images("test") / 255
    mean, std = (np.array(values)[:, None, None] for values in (data.mean, data.std))
    assert np.allclose(images.numpy(), (wanted - mean) / std, atol=1e-5)
    assert torch.cat([batch.indices for batch in drawn]).tolist() == list(range(12))
    assert torch.cat([batch.labels for batch in drawn]).tolist() == data.labels("test").tolist()
    assert drawn[0].labels.dtype == drawn[0].indices.dtype == torch.int64


def test_train_is_normalised_to_mean_0_and_std_1(data: Prepared) -> None:
    images = torch.cat([batch.images for batch in data.batches("train", batch_size=36).epoch(0)])
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


@pytest.mark.parametrize("needs", PARTNERS)
def test_indices_point_at_the_images_and_labels(data: Prepared, needs: BatchNeeds) -> None:
    for batch in data.batches("train", batch_size=7, shuffle=True, seed=4).epoch(3, needs):
        assert torch.equal(raw(data, batch.images), torch.from_numpy(data.images("train"))[batch.indices])
        assert torch.equal(torch.from_numpy(data.labels("train"))[batch.indices], batch.labels)


def test_every_crop_is_a_shift_of_its_image_with_black_around_and_flips(data: Prepared) -> None:
    images = torch.from_numpy(data.images("train"))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    options = Augmentation(crop_padding=2, flip=True)
    seen = set()
    for batch in data.batches("train", batch_size=36, augmentation=options, shuffle=True).epoch(0):
        for image, index in zip(raw(data, batch.images), batch.indices.tolist(), strict=True):
            crops = [
                (top, left, mirrored)
                for top in range(5)
                for left in range(5)
                for mirrored in (False, True)
                if torch.equal(image.flip(2) if mirrored else image, padded[index, :, top : top + 6, left : left + 6])
            ]
            assert len(crops) == 1
            seen.add(crops[0])
    assert {crop[0] for crop in seen} == {crop[1] for crop in seen} == set(range(5))
    assert {crop[2] for crop in seen} == {False, True}


def test_no_flip_unless_asked(data: Prepared) -> None:
    images = torch.from_numpy(data.images("train"))
    batch = next(data.batches("train", batch_size=36, augmentation=Augmentation(), shuffle=True).epoch(0))
    assert torch.equal(raw(data, batch.images), images[batch.indices])
    half = next(data.batches("train", batch_size=36, augmentation=Augmentation(flip=True), shuffle=True).epoch(0))
    kept = (raw(data, half.images) == images[half.indices]).flatten(1).all(1)
    assert 5 < int(kept.sum()) < 31
    assert torch.equal(raw(data, half.images)[~kept], images[half.indices][~kept].flip(3))


def test_a_view_is_the_same_image_augmented_anew(data: Prepared) -> None:
    drawn = data.batches("train", batch_size=36, augmentation=Augmentation(2, True), shuffle=True)
    batch = next(drawn.epoch(0, BatchNeeds("view")))
    assert batch.partner is not None
    differ = (batch.images != batch.partner).flatten(1).any(1)
    assert differ.float().mean() > 0.8
    plain = next(data.batches("train", batch_size=36).epoch(0, BatchNeeds("view")))
    assert plain.partner is not None
    assert torch.equal(plain.images, plain.partner)


def test_a_partner_is_some_image_of_the_class(data: Prepared) -> None:
    known = {image.numpy().tobytes(): i for i, image in enumerate(torch.from_numpy(data.images("train")))}
    pairs = set()
    for epoch in range(30):
        for batch in data.batches("train", batch_size=9, shuffle=True).epoch(epoch, BatchNeeds("same_class")):
            assert batch.partner is not None
            partners = [known[image.numpy().tobytes()] for image in raw(data, batch.partner)]
            assert data.labels("train")[partners].tolist() == batch.labels.tolist()
            pairs.update(zip(batch.indices.tolist(), partners, strict=True))
    assert len(pairs) > 0.7 * 2 * 18 * 18  # of all pairs inside the two classes of 18
    assert any(own == other for own, other in pairs)


@pytest.mark.parametrize("needs", PARTNERS)
def test_an_epoch_depends_on_seed_and_number_alone(data: Prepared, needs: BatchNeeds) -> None:
    def draw(seed: int, number: int) -> list[Batch]:
        torch.manual_seed(seed + number + 77)
        options = Augmentation(1, True)
        batches = data.batches("train", batch_size=8, seed=seed, augmentation=options, shuffle=True, drop_last=True)
        list(batches.epoch(number + 5, needs))  # what was drawn before has no part in it
        return list(batches.epoch(number, needs))

    one = draw(0, 1)
    assert same(one, draw(0, 1))
    assert not same(one, draw(0, 2))
    assert not same(one, draw(1, 1))


def test_the_batch_size_moves_no_augmentation_and_no_partner(data: Prepared) -> None:
    def draw(size: int) -> list[Tensor]:
        options = Augmentation(1, True)
        batches = list(data.batches("train", batch_size=size, augmentation=options, shuffle=True).epoch(0, PARTNERS[2]))
        return [torch.cat(column) for column in zip(*batches, strict=True)]

    assert all(torch.equal(a, b) for a, b in zip(draw(36), draw(5), strict=True))


def test_drawing_leaves_the_global_random_state_alone(data: Prepared) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(data.batches("train", batch_size=8, augmentation=Augmentation(1, True), shuffle=True).epoch(0, PARTNERS[2]))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_drawing_leaves_the_stored_images_alone(data: Prepared) -> None:
    before = data.images("train").copy()
    list(data.batches("train", batch_size=8).epoch(0))
    assert np.array_equal(before, data.images("train"))


def test_short_last_batch_and_drop_last(data: Prepared) -> None:
    assert [len(b.labels) for b in data.batches("test", batch_size=5, drop_last=True).epoch(0)] == [5, 5]
    assert [len(b.labels) for b in data.batches("test", batch_size=50).epoch(0)] == [12]
    with pytest.raises(TooFewImages, match="has 12, the batch size is 50"):
        data.batches("test", batch_size=50, drop_last=True)


def test_batches_of_one_split_share_its_pixels(data: Prepared) -> None:
    def pixels(padding: int) -> int:
        batches = data.batches("train", batch_size=4, augmentation=Augmentation(padding))
        assert isinstance(batches, MemoryBatches)
        return batches._pixels.padded.data_ptr()

    assert pixels(1) == pixels(1)
    assert pixels(1) != pixels(0)


def test_pixels_are_padded_with_black() -> None:
    padded = Pixels.of(torch.full((2, 3, 4, 5), 9, dtype=torch.uint8), 2).padded
    assert padded.shape == (2, 8, 9, 3)
    assert int(padded.sum()) == 2 * 3 * 4 * 5 * 9


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    prepare(arrays(40), tmp_path, validation=0)
    with pytest.raises(EpsdError, match=r"has no validation split; set data.validation above 0"):
        Prepared.load(tmp_path).batches("validation", batch_size=4)


def test_missing_and_other_artifacts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"data.json: missing. `dvc repro`"):
        Prepared.load(tmp_path)
    prepare(arrays(40), tmp_path)
    images = tmp_path / "train_images.npy"
    images.write_bytes(images.read_bytes()[:500])
    with pytest.raises(DamagedFile, match=r"train_images.npy: damaged or replaced"):
        Prepared.load(tmp_path).batches("train", batch_size=4)
    for labels, words in (
        (np.zeros(3, dtype=np.int64), r"holds \(3,\) int64, data.json says \(8,\) int64"),
        (np.zeros(8, dtype=np.float64), r"holds \(8,\) float64, data.json says \(8,\) int64"),
        (np.arange(8), "labels reach from 0 to 7, classes are 2"),
        (np.arange(8) - 7, "labels reach from -7 to 0, classes are 2"),
    ):
        np.save(tmp_path / "test_labels.npy", labels)
        with pytest.raises(DamagedFile, match=r"test_labels.npy"):
            Prepared.load(tmp_path).labels("test")
        sealed(tmp_path, "test_labels.npy")
        with pytest.raises(EpsdError, match=f"test_labels.npy: {words}"):
            Prepared.load(tmp_path).labels("test")


def sealed(folder: Path, name: str) -> None:
    """As if `prepare` had written the file."""
    index = artifacts.read_json(folder / "data.json")
    index["digests"][name] = digest_of(folder / name)
    artifacts.write_json(folder / "data.json", index)


def test_a_streamed_image_that_was_changed_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", classes(8, size=80))
    prepare(folder_source(open_tree(root), Reading()), tmp_path / "out", seed=1)
    data = Prepared.load(tmp_path / "out")
    name = artifacts.read_json(tmp_path / "out" / "test_files.json")["files"][1]
    (root / name).write_bytes(picture(99, 80))
    with pytest.raises(ImageError, match=rf"{name}: changed or damaged since prepare read it"):
        list(data.batches("test", batch_size=5).epoch(0))
