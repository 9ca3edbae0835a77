import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from data.test_prepared import same
from epsd.data.loaders import LoaderError, as_batches
from epsd.data.sampling import TooFewImages
from epsd.types import Batch, Batches, BatchNeeds

VIEW, CLASS = BatchNeeds("view"), BatchNeeds("same_class")


class Photos(Dataset[Any]):
    """`count` images whose pixels tell their position; `noise`: augmentation from three generators."""

    def __init__(self, count: int = 23, noise: bool = False) -> None:
        self.count, self.noise, self.asked = count, noise, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked += 1
        image = torch.full((3, 4, 4), float(index))
        if self.noise:
            image = image + (torch.rand(()) + random.random() + float(np.random.rand())) / 10
        return image, index % 3


def epochs(loader: DataLoader[Any], needs: BatchNeeds = BatchNeeds(), number: int = 0) -> list[Batch]:
    return list(as_batches(loader).epoch(number, needs))


def test_prepared_batches_pass_through() -> None:
    batches = as_batches(DataLoader(Photos(), batch_size=4))
    assert as_batches(batches) is batches
    assert isinstance(batches, Batches)


def test_a_plain_loader_gives_its_own_batches() -> None:
    loader = DataLoader(Photos(), batch_size=4)
    batches = as_batches(loader)
    assert (batches.size, batches.num_classes, len(batches)) == (23, 0, 6), "its classes are nowhere written"
    for own, (images, labels) in zip(batches.epoch(0), loader, strict=True):
        assert torch.equal(own.images, images) and torch.equal(own.labels, labels)
        assert own.indices.tolist() == images[:, 0, 0, 0].tolist()
        assert own.partner is None


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffle_batch_size_and_drop_last_are_taken_over(workers: int) -> None:
    loader = DataLoader(Photos(), batch_size=5, shuffle=True, drop_last=True, num_workers=workers)
    batches = as_batches(loader)
    assert len(batches) == 4
    drawn = [list(batches.epoch(number)) for number in (0, 1)]
    orders = [torch.cat([batch.indices for batch in epoch]).tolist() for epoch in drawn]
    assert [len(set(order)) for order in orders] == [20, 20]
    assert orders[0] != orders[1] != sorted(orders[1])
    assert all(batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist() for batch in drawn[0])


@pytest.mark.parametrize("needs", [BatchNeeds(), VIEW, CLASS])
def test_the_same_in_any_number_of_workers_and_under_any_global_seed(needs: BatchNeeds) -> None:
    drawn = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        drawn.append(epochs(DataLoader(Photos(noise=True), batch_size=5, shuffle=True, num_workers=workers), needs, 2))
    assert same(*drawn)
    assert not same(drawn[0], epochs(DataLoader(Photos(noise=True), batch_size=5, shuffle=True), needs, 3))


def test_a_view_is_drawn_again_and_a_partner_is_of_the_class() -> None:
    for batch in epochs(DataLoader(Photos(noise=True), batch_size=5, shuffle=True), VIEW):
        assert batch.partner is not None
        assert torch.equal(batch.partner.floor(), batch.images.floor())
        assert (batch.partner != batch.images).flatten(1).any(1).all()
    seen = []
    for number in range(20):
        for batch in epochs(DataLoader(Photos(), batch_size=5, shuffle=True), CLASS, number):
            assert batch.partner is not None
            positions = batch.partner[:, 0, 0, 0].long()
            assert torch.equal(positions % 3, batch.labels)
            seen += (positions == batch.indices).tolist()
    assert 0.05 < sum(seen) / len(seen) < 0.25  # itself once in 7 or 8


def test_drawing_leaves_the_global_random_states_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    epochs(DataLoader(Photos(noise=True), batch_size=5, shuffle=True), CLASS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_your_sampler_is_honoured_and_reproducible() -> None:
    weights = [1.0 if i < 5 else 0.0 for i in range(23)]
    orders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sampler = WeightedRandomSampler(weights, 40, generator=torch.Generator() if seed else None)
        batches = as_batches(DataLoader(Photos(), batch_size=8, sampler=sampler))
        assert len(batches) == 5
        epoch = [torch.cat([batch.indices for batch in batches.epoch(number, CLASS)]).tolist() for number in (0, 0, 1)]
        assert epoch[0] == epoch[1] != epoch[2]
        assert max(epoch[0]) < 5 and len(epoch[0]) == 40
        orders.append(epoch[0])


def test_your_batch_sampler_is_honoured() -> None:
    class Pairs(BatchSampler):
        def __init__(self) -> None:
            super().__init__(SequentialSampler(range(6)), 2, False)

        def __iter__(self) -> Iterator[list[int]]:
            yield from ([0, 3], [5], [1, 2, 4])

    drawn = epochs(DataLoader(Photos(), batch_sampler=Pairs()), VIEW)
    assert [batch.indices.tolist() for batch in drawn] == [[0, 3], [5], [1, 2, 4]]
    assert all(batch.partner is not None and torch.equal(batch.partner, batch.images) for batch in drawn)


def test_a_distributed_sampler_is_told_the_epoch() -> None:
    from torch.utils.data.distributed import DistributedSampler

    sampler: DistributedSampler[Any] = DistributedSampler(Photos(), num_replicas=2, rank=0)
    batches = as_batches(DataLoader(Photos(), batch_size=4, sampler=sampler))
    orders = [torch.cat([batch.indices for batch in batches.epoch(number)]).tolist() for number in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert len(orders[0]) == 12


@pytest.mark.parametrize("own", [False, True])
def test_partners_are_drawn_from_what_the_sampler_gives(own: bool) -> None:
    """Held out for validation by a sampler: never seen in training, not even as a partner."""
    sampler = SubsetRandomSampler(range(15), generator=torch.Generator().manual_seed(3) if own else None)
    partners: set[int] = set()
    for number in range(8):
        for batch in epochs(DataLoader(Photos(), batch_size=5, sampler=sampler), CLASS, number):
            assert batch.partner is not None
            positions = batch.partner[:, 0, 0, 0].long()
            assert torch.equal(positions % 3, batch.labels)
            partners |= set(positions.tolist())
    assert partners == set(range(15))


def test_seed_and_the_loaders_own_generator_decide_the_order() -> None:
    def order(seed: int, own: int | None, sampled: bool = False) -> list[int]:
        generator = None if own is None else torch.Generator().manual_seed(own)
        sampler = SubsetRandomSampler(range(23), generator=generator) if sampled else None
        loader = DataLoader(
            Photos(), batch_size=5, shuffle=sampler is None, sampler=sampler, generator=None if sampled else generator
        )
        drawn = torch.cat([batch.indices for batch in as_batches(loader, seed=seed).epoch(0)]).tolist()
        again = torch.cat([batch.indices for batch in as_batches(loader, seed=seed).epoch(0)]).tolist()
        assert drawn == again, "the generator is left as it was"
        return list(drawn)

    for sampled in (False, True):
        found = [order(seed, own, sampled) for seed, own in ((0, None), (1, None), (0, 0), (0, 7), (1, 7))]
        assert len({tuple(one) for one in found}) == 5
        assert order(1, 7, sampled) == found[-1]


def test_sampling_with_replacement_is_honoured() -> None:
    sampler = RandomSampler(Photos(), replacement=True, num_samples=50)
    order = torch.cat([batch.indices for batch in epochs(DataLoader(Photos(), batch_size=8, sampler=sampler))])
    assert len(order) == 50 and len(set(order.tolist())) <= 23


def collate_half(samples: list[Any]) -> Any:
    images, labels = default_collate(samples)
    return images / 2, labels


def collate_noisy(samples: list[Any]) -> Any:
    images, labels = default_collate(samples)
    return images + torch.rand(()) + random.random() + float(np.random.rand()), labels


def test_what_a_collate_draws_depends_on_seed_and_epoch_alone() -> None:
    drawn = []
    for workers, number in ((0, 1), (2, 1), (1, 1), (0, 2)):
        torch.manual_seed(workers)
        loader = DataLoader(Photos(), batch_size=5, collate_fn=collate_noisy, num_workers=workers)
        drawn.append(epochs(loader, VIEW, number))
    assert same(drawn[0], drawn[1]) and same(drawn[0], drawn[2])
    assert not same(drawn[0], drawn[3])
    noise = [float(image[0, 0, 0, 0]) for batch in drawn[0] for image in (batch.images, batch.partner)]
    assert len({round(value % 1, 5) for value in noise}) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_your_collate_is_honoured_for_images_and_partners(workers: int) -> None:
    loader = DataLoader(Photos(), batch_size=5, collate_fn=collate_half, num_workers=workers)
    for batch in epochs(loader, VIEW):
        assert batch.partner is not None
        assert (
            (batch.images[:, 0, 0, 0] * 2).tolist()
            == (batch.partner[:, 0, 0, 0] * 2).tolist()
            == batch.indices.tolist()
        )


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            lambda samples: default_collate(samples)[0],
            r"must be \(images, labels\), two tensors; .* gives float32 \(5, 3, 4, 4\)",
        ),
        (lambda samples: dict(enumerate(samples)), r"gives dict"),
        (lambda samples: samples, "gives list of 5: tuple"),
        (lambda s: (torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.zeros(5).long()), r"must be float .* got uint8"),
        (lambda s: (torch.zeros(5), torch.zeros(5).long()), r"images must be float \(B, C, H, W\) or \(B, \.\.\.\)"),
        (
            lambda s: (torch.zeros(5, 3, 4, 4), torch.rand(3, 5)),
            r"labels must be 5, one per image; got float32 \(3, 5\)",
        ),
    ],
)
def test_batches_of_another_form_are_refused(collate: Any, message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        epochs(DataLoader(Photos(20), batch_size=5, collate_fn=collate))


class Listed(Photos):
    """As torchvision's: labels in `targets`."""

    def __init__(self, targets: Any) -> None:
        super().__init__(len(targets))
        self.targets = targets
        self.target_transform: Any = None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, _ = super().__getitem__(index)
        label = int(self.targets[index])
        return image, self.target_transform(label) if self.target_transform else label


LABELS = [0, 1, 1, 2, 0, 2, 1, 0]


@pytest.mark.parametrize(
    "dataset",
    [
        Listed(LABELS),
        Listed(torch.tensor(LABELS)),
        Listed(np.array(LABELS)),
        Subset(Listed([9, 9, *LABELS]), range(2, 10)),
        ConcatDataset([Listed(LABELS[:3]), Listed(LABELS[3:])]),
        TensorDataset(torch.rand(8, 3, 4, 4), torch.tensor(LABELS)),
    ],
)
def test_known_labels_are_used_without_asking_for_images(dataset: Any) -> None:
    batches = as_batches(DataLoader(dataset, batch_size=4))
    assert batches.num_classes == 3
    for part in getattr(dataset, "datasets", [getattr(dataset, "dataset", dataset)]):
        assert getattr(part, "asked", 0) == 0
    drawn = list(batches.epoch(0, CLASS))
    assert torch.cat([batch.labels for batch in drawn]).tolist() == LABELS


def test_labels_changed_by_a_transform_are_asked_for() -> None:
    dataset = Listed([0, 1] * 6)
    dataset.target_transform = lambda label: 3 - label
    batches = as_batches(DataLoader(dataset, batch_size=4))
    list(batches.epoch(0))
    assert dataset.asked == 12, "nobody needs labels beforehand"
    next(iter(batches.epoch(0, CLASS)))
    assert dataset.asked == 12 + 12 + 8
    for batch in batches.epoch(0, CLASS):
        assert batch.partner is not None
        assert torch.equal(3 - batch.partner[:, 0, 0, 0].long() % 2, batch.labels)


def test_num_classes_comes_from_the_caller_or_the_dataset() -> None:
    dataset = Photos()
    assert as_batches(DataLoader(dataset, batch_size=4), num_classes=7).num_classes == 7
    dataset.classes = ["a"] * 5  # type: ignore[attr-defined]
    assert as_batches(DataLoader(dataset, batch_size=4)).num_classes == 5
    assert dataset.asked == 0


def test_targets_that_lie_are_found_out() -> None:
    dataset = Listed(LABELS)
    batches = as_batches(DataLoader(dataset, batch_size=8))
    list(batches.epoch(0, CLASS))
    dataset.targets = [1, 0, 2, 1, 1, 0, 0, 2]
    with pytest.raises(LoaderError, match="labels changed between two readings"):
        list(batches.epoch(0, CLASS))


class Stream(IterableDataset[Any]):
    def __init__(self, count: int | None = 10) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for i in range(self.count or 10):
            yield torch.full((1, 2, 2), float(i)), i % 2


class Counted(Stream):
    def __len__(self) -> int:
        return self.count or 0


def test_an_iterable_dataset_gives_images_and_labels() -> None:
    batches = as_batches(DataLoader(Counted(), batch_size=4), num_classes=2)
    assert isinstance(batches, Batches)
    assert (batches.size, len(batches)) == (10, 3)
    state = torch.get_rng_state()
    drawn = list(batches.epoch(0))
    assert torch.cat([batch.indices for batch in drawn]).tolist() == list(range(10))
    assert torch.cat([batch.images for batch in drawn])[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("needs", [VIEW, CLASS, BatchNeeds(indices=True)])
def test_an_iterable_dataset_cannot_be_asked_again(needs: BatchNeeds) -> None:
    batches = as_batches(DataLoader(Counted(), batch_size=4), num_classes=2)
    with pytest.raises(LoaderError, match="objective asks for single images again"):
        next(batches.epoch(0, needs))


def test_what_cannot_be_wrapped_is_named() -> None:
    with pytest.raises(LoaderError, match=r"batches must be of type epsd\.Batch, the data gave int"):
        as_batches([1, 2])  # type: ignore[list-item]
    with pytest.raises(LoaderError, match="got int"):
        as_batches(1)  # type: ignore[arg-type]
    with pytest.raises(LoaderError, match="batch_size=None"):
        as_batches(DataLoader(Photos(), batch_size=None))
    with pytest.raises(LoaderError, match="needs a __len__"):
        len(as_batches(DataLoader(Stream(), batch_size=4), num_classes=2))
    assert as_batches(DataLoader(Counted(), batch_size=4)).num_classes == 0
    for label, message in (("cat", "integer label"), (torch.tensor([0, 1]), "integer label"), (-1, "label -1")):
        with pytest.raises(LoaderError, match=message):
            epochs(DataLoader([(torch.zeros(3, 4, 4), label)] * 4, batch_size=2), CLASS)  # type: ignore[arg-type]
    with pytest.raises(LoaderError, match="label -1"):
        epochs(DataLoader(Listed([0, -1, 1, 1]), batch_size=2))
    with pytest.raises(TooFewImages, match="the split has 3, the batch size is 4"):
        as_batches(DataLoader(Photos(3), batch_size=4, drop_last=True))


def test_batches_that_are_there_are_passed_over_again_and_again() -> None:
    """A list anew in each epoch; an iterator, which ends once, too."""
    made = list(as_batches(DataLoader(Photos(20), batch_size=6)).epoch(0))
    for given in (made, iter(made), (batch for batch in made)):
        batches = as_batches(given)
        assert (batches.size, len(batches), batches.num_classes) == (20, 4, 3)
        for number in range(2):
            seen = list(batches.epoch(number, BatchNeeds(indices=True)))
            assert all(torch.equal(one.images, two.images) for one, two in zip(seen, made, strict=True))
    far = as_batches([made[0]._replace(indices=made[0].indices + 20)])
    assert len(list(far.epoch(0))) == 1
    with pytest.raises(LoaderError, match="a batch has the index 25, the data 6 images"):
        list(far.epoch(0, BatchNeeds(indices=True)))


@pytest.mark.parametrize("shape", [(7,), (2, 9), (1, 5, 5, 5)])
@pytest.mark.parametrize("targets", [torch.rand(12), torch.rand(12, 3), torch.randint(0, 2, (12, 4, 4))])
def test_inputs_of_any_shape_and_targets_of_any_kind(shape: tuple[int, ...], targets: Tensor) -> None:
    images = torch.rand(12, *shape)
    batches = epochs(DataLoader(TensorDataset(images, targets), batch_size=5))
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), targets)


class Noisy(Counted):
    """Draws from all three generators, and shuffles."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for i in random.sample(range(self.count or 0), self.count or 0):
            yield torch.full((1, 2, 2), float(i)) + torch.rand(1) + float(np.random.rand()), i % 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_decides_what_an_iterable_dataset_draws(workers: int) -> None:
    """With the epoch; the loader's own generator is mixed in. The global random state is left alone."""

    def images(seed: int, epoch: int, own: int | None = None) -> Tensor:
        generator = None if own is None else torch.Generator().manual_seed(own)
        loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=4, num_workers=workers, generator=generator)
        return torch.cat([batch.images for batch in as_batches(loader, seed=seed).epoch(epoch)])

    state, numpy, python = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = images(0, 0)
    assert torch.equal(first, images(0, 0))
    assert not any(torch.equal(first, other) for other in (images(1, 0), images(0, 1), images(0, 0, own=5)))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy == np.random.get_state()[1]).all() and python == random.getstate()
