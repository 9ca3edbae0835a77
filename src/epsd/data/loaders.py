"""Your own DataLoader as `Batches`: what an objective needs beyond images and labels is added around it."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from epsd.compute.seeds import mix
from epsd.data.sampling import SameClass, Sampler, cut, partner_positions
from epsd.data.streaming import Requests, as_requests, draw_batches, drawing_from
from epsd.losses import are_classes
from epsd.types import Batch, Batches, BatchNeeds, EpsdError


class LoaderError(EpsdError):
    """A DataLoader that cannot give what training needs of it."""


Source = Batches | DataLoader[Any] | Iterable[Batch]
"""What is pruned, trained and judged by: prepared batches, a DataLoader of (image, label), any iterable of `Batch`."""


def as_batches(source: Source, *, num_classes: int | None = None, seed: int = 0) -> Batches:
    """`source` itself where it is `Batches`; a DataLoader of (image, label) or an iterable of `Batch` wrapped as such.

    The dataset must give (image, label): a float tensor of any shape, (C, H, W) say, ready for the network, and an
    integer, or a tensor that a loss of one's own takes: probabilities, several labels, numbers. Batch size, order
    (shuffled or not, or a sampler of yours), `drop_last`, workers and `collate_fn` are taken over. Second views are
    drawn by asking the dataset again, partners by asking it for another image of the class among those that the loader
    gives. Random numbers that dataset and `collate_fn` take from torch, numpy or random come from (seed, epoch,
    position), the order from (seed, epoch); the seed of the loader's own generator, where it has one, is mixed in.

    Parameters
    ----------
    num_classes : None takes what the dataset says openly (`classes`, `targets`); 0 where it says nothing.

    Raises
    ------
    LoaderError : no automatic batching; samples or batches of another form; an IterableDataset where an objective
        needs partners or indices, or without length where the length is asked for.
    """
    if isinstance(source, Batches):
        return source
    if not isinstance(source, DataLoader):
        return GivenBatches(source)
    if isinstance(source.dataset, IterableDataset):
        return StreamBatches(source, num_classes, seed)
    if source.batch_sampler is None:
        raise LoaderError("the DataLoader has batch_size=None: give it a batch size, its dataset single samples.")
    return LoaderBatches(source, num_classes, seed)


def _mixed(loader: DataLoader[Any], seed: int) -> int:
    """`seed`, and that of the generator that the user gave to the loader or to its sampler."""
    own = loader.generator or getattr(loader.sampler, "generator", None)
    return seed if own is None else mix(seed, own.initial_seed())


class LoaderBatches:
    """Batches of a DataLoader over a dataset that can be asked for any sample."""

    def __init__(self, loader: DataLoader[Any], num_classes: int | None, seed: int) -> None:
        self._loader, self._seed = loader, _mixed(loader, seed)
        self._dataset = loader.dataset
        self.size = len(cast(Sized, loader.dataset))
        self._requests = Requests(self._dataset.__getitem__, loader.collate_fn, self._seed)
        self._plan = _plan(loader, self.size, self._seed)
        self._known = _known_labels(self._dataset)
        largest = -1 if self._known is None else int(self._known.max())
        self.num_classes = num_classes or len(getattr(self._dataset, "classes", ())) or largest + 1

    def __len__(self) -> int:
        return len(self._loader) if self._plan is None else len(self._plan)

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """The batches of epoch `number`; `partner` is filled as `needs` asks, `indices` always."""
        batches = self._batches(number)
        sizes = [len(batch) for batch in batches]
        order = torch.cat(list(batches)) if batches else torch.empty(0, dtype=torch.int64)
        if needs.partner == "same_class":
            second: Tensor | None = self._partners(order, number)
        else:
            second = partner_positions(needs, order, number, _NOBODY)
        asked = as_requests(number, batches, None if second is None else cut(second, sizes))
        for indices, drawn in zip(batches, draw_batches(self._requests, asked, **self._workers()), strict=True):
            images, labels = _pair(drawn.samples)
            partner = None
            if drawn.partners is not None:
                partner, partner_labels = _pair(drawn.partners)
                if not torch.equal(labels, partner_labels):
                    raise LoaderError("the dataset's labels changed between two readings of one image: no partners.")
            yield Batch(images, labels, indices, partner)

    def _batches(self, epoch: int) -> Sequence[Tensor]:
        """Positions per batch: by our own plan where the loader's order is a usual one, else as its sampler says."""
        if self._plan is not None:
            return cut(self._plan.order(epoch), self._plan.batch_size)
        sampler: Any = getattr(self._loader.batch_sampler, "sampler", self._loader.batch_sampler)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        with drawing_from(self._seed, "order", epoch), _seeded(getattr(sampler, "generator", None), self._seed, epoch):
            return [torch.tensor(batch, dtype=torch.int64) for batch in self._loader.batch_sampler or ()]

    def _partners(self, order: Tensor, epoch: int) -> Tensor:
        """(M,) another image of the class for each of `order`, among those that the loader gives: what a sampler
        holds back (for validation, say) is never drawn.
        """
        if self._plan is not None:
            return self._same_class.partners(order, epoch)
        given, places = torch.unique(order, return_inverse=True)
        chosen: Tensor = given[SameClass(self.labels[given], self._seed).partners(places, epoch)]
        return chosen

    def _workers(self) -> dict[str, Any]:
        taken = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor", "multiprocessing_context")
        return {name: getattr(self._loader, name) for name in taken}

    def lengths(self) -> set[int]:
        """How many images its batches hold, as far as that is known before they are drawn."""
        return set() if self._plan is None else self._plan.lengths()

    @cached_property
    def labels(self) -> Tensor:
        """(N,) of the data set."""
        return self._scanned() if self._known is None else self._known

    @cached_property
    def _same_class(self) -> SameClass:
        return SameClass(self.labels, self._seed)

    def _scanned(self) -> Tensor:
        """Every sample asked once for its label."""
        requests = Requests(self._dataset.__getitem__, _labels_of, self._seed)
        asked = as_requests(0, cut(torch.arange(self.size), 256), None)
        return torch.cat([drawn.samples for drawn in draw_batches(requests, asked, **self._workers())])


@contextmanager
def _seeded(generator: Any, seed: int, epoch: int) -> Iterator[None]:
    """A sampler's own generator starts from (seed, epoch) in the block, and is as it was afterwards."""
    if not isinstance(generator, torch.Generator):
        yield
        return
    before = generator.get_state()
    generator.manual_seed(mix(seed, "order", epoch))
    try:
        yield
    finally:
        generator.set_state(before)


_NOBODY = SameClass(torch.empty(0, dtype=torch.int64), 0)


def _plan(loader: DataLoader[Any], size: int, seed: int) -> Sampler | None:
    """Our own order for the two usual ones; None where the loader has a sampler of its own."""
    sampler = loader.batch_sampler
    if type(sampler) is not BatchSampler:
        return None
    inner = sampler.sampler
    shuffled = type(inner) is RandomSampler and not inner.replacement and inner.num_samples == size
    if not shuffled and type(inner) is not SequentialSampler:
        return None
    return Sampler(size, sampler.batch_size, seed, shuffled, sampler.drop_last)


def _known_labels(dataset: Any) -> Tensor | None:
    """Labels that the dataset carries openly (as torchvision's do); None where it must be asked sample by sample."""
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(cast("list[Tensor]", parts))
    if isinstance(dataset, TensorDataset):
        targets = dataset.tensors[-1] if len(dataset.tensors) == 2 else None
    else:
        targets = getattr(dataset, "targets", None)
    if targets is None or getattr(dataset, "target_transform", None) is not None:
        return None
    try:
        labels = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = labels.ndim == 1 and not labels.is_floating_point() and len(labels) == len(dataset) > 0
    return labels.long() if whole and labels.min() >= 0 else None


def _labels_of(samples: list[Any]) -> Tensor:
    try:
        labels = torch.tensor([int(label) for _, label in samples], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):  # the last of tensors with several numbers
        raise LoaderError("the dataset must give (image, label) with an integer label.") from None
    if labels.min() < 0:
        raise LoaderError(f"the dataset gives the label {int(labels.min())}: labels count from 0.")
    return labels


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Float images (B, ...) and labels: (B,) int64, or targets (B, ...). LoaderError says what came instead."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise LoaderError(f"a batch must be (images, labels), two tensors; the DataLoader gives {_shape_of(batch)}.")
    images, labels = batch
    if images.ndim < 2 or not images.is_floating_point():
        raise LoaderError(
            f"images must be float (B, C, H, W) or (B, ...), ready for the network; got {_shape_of(images)}."
        )
    if labels.shape[:1] != images.shape[:1]:
        raise LoaderError(f"labels must be {len(images)}, one per image; got {_shape_of(labels)}.")
    if labels.is_floating_point() or labels.ndim > 1:
        return images, labels
    if len(labels) and labels.min() < 0:
        raise LoaderError(f"a batch has the label {int(labels.min())}: labels count from 0.")
    return images, labels.long()


def _shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}: {', '.join(type(part).__name__ for part in value[:4])}"
    return type(value).__name__


class GivenBatches:
    """An iterable of `Batch`, begun anew in each epoch; an iterator, which ends once, is kept in memory.

    Partners and indices are those that its batches bring.
    """

    def __init__(self, given: Iterable[Batch]) -> None:
        if not isinstance(given, Iterable):
            raise LoaderError(
                f"expected prepared batches, a torch DataLoader or epsd.Batch, got {type(given).__name__}."
            )
        self._given = list(given) if isinstance(given, Iterator) else given
        self.size = self._count = self.num_classes = 0
        for batch in self._given:
            if not isinstance(batch, Batch):
                raise LoaderError(
                    f"batches must be of type epsd.Batch, the data gave {type(batch).__name__}. A DataLoader of "
                    "(image, label) pairs is turned into such."
                )
            self.size, self._count = self.size + len(batch.labels), self._count + 1
            if are_classes(batch.labels) and len(batch.labels):
                self.num_classes = max(self.num_classes, int(batch.labels.max()) + 1)

    def __len__(self) -> int:
        return self._count

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """The batches as they are. LoaderError: an index that is none of so many images, where indices are needed."""
        for batch in self._given:
            if needs.indices and len(batch.indices) and int(batch.indices.max()) >= self.size:
                raise LoaderError(
                    f"a batch has the index {int(batch.indices.max())}, the data {self.size} images: they count from 0."
                )
            yield batch


class StreamBatches:
    """Batches of a DataLoader over an IterableDataset: images and labels as they come, nothing can be asked again.

    What is drawn on the way, here or in the loader's workers, comes from (seed, epoch, position of the batch).
    """

    def __init__(self, loader: DataLoader[Any], num_classes: int | None, seed: int) -> None:
        self._loader, self._seed = loader, _mixed(loader, seed)
        self.size = len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0
        self.num_classes = num_classes or len(getattr(loader.dataset, "classes", ()))

    def __len__(self) -> int:
        """Raises LoaderError where the dataset does not say."""
        if not self.size:
            raise LoaderError("to train on an IterableDataset it needs a __len__: the schedule counts the batches.")
        return len(self._loader)

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """The batches as they come; `indices` count them through. Raises LoaderError where more is needed."""
        if needs.partner != "none" or needs.indices:
            raise LoaderError(
                "this objective asks for single images again (partners or indices), which an IterableDataset cannot "
                "give: use a dataset with __getitem__ and __len__, or objective.name: cross_entropy."
            )
        loader = copy.copy(self._loader)
        loader.generator = torch.Generator().manual_seed(mix(self._seed, "stream", number))
        with drawing_from(self._seed, "stream", number):
            drawn = iter(loader)
        start = 0
        for position in itertools.count():
            with drawing_from(self._seed, "stream", number, position):
                batch = next(drawn, None)
            if batch is None:
                return
            images, labels = _pair(batch)
            yield Batch(images, labels, torch.arange(start, start + len(labels)))
            start += len(labels)
