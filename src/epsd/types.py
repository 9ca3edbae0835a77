"""The words every module shares: a batch, a loss, the protocols of the choices. No logic."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:  # these words are on the start-up path of commands that need no torch
    from torch import Tensor, nn

Forward = Callable[["Tensor"], "Tensor"]
"""Images (B, C, H, W) -> logits (B, K). A module is one; so is a module called with other weights."""

Scores = dict[str, "Tensor"]
"""Parameter name -> saliency of the parameter's shape. Higher = keep."""

Purpose = Literal["score", "train"]
Partner = Literal["none", "view", "same_class"]


class Batch(NamedTuple):
    """One draw of images.

    `images` (B, C, H, W) normalised, or other inputs (B, ...) that the network takes; `labels` (B,) int64, or targets
    (B, ...) of a loss of one's own, probabilities (B, K) for cross entropy; `indices` (B,) int64, position in the
    split that the batch was drawn from; `partner` (B, C, H, W): a second augmentation of the same images
    ("view") or one random image of the same class each ("same_class"), None where nobody asked.
    """

    images: "Tensor"
    labels: "Tensor"
    indices: "Tensor"
    partner: "Tensor | None" = None

    def part(self, piece: slice) -> "Batch":
        """Some of the images, in their order."""
        return Batch(*(None if field is None else field[piece] for field in self))  # type: ignore[arg-type]


class BatchNeeds(NamedTuple):
    """What an objective needs of a batch beyond images and labels."""

    partner: Partner = "none"
    indices: bool = False


class Loss(NamedTuple):
    """`total`: scalar, twice differentiable. `terms`: detached scalars by name, logged as `train/<name>`.
    `logits`: (B, K) of `batch.images`, detached, None where a network gives no such thing. `parts`: the differentiable
    summands of `total` by name, ("supervised", "distillation"), from which the prune report takes their gradient norms.
    """

    total: "Tensor"
    terms: "dict[str, Tensor]"
    logits: "Tensor | None"
    parts: "Mapping[str, Tensor]" = MappingProxyType({})


class Objective(Protocol):
    """One self-distillation method (`cross_entropy`: the one that distils nothing); by default without state.

    State is replaced, never changed in place, while the purpose is "score": `copy.copy(objective)` is then a
    snapshot, which the meta-gradient takes before every step so that it can evaluate the same loss again.
    """

    @property
    def needs(self) -> BatchNeeds:
        """What a batch must carry for this method; by default images and labels."""
        return BatchNeeds()

    def begin(self, purpose: Purpose, train_size: int, num_classes: int) -> None:
        """Forget all state. `train_size` images in the training split, `num_classes` (0: unknown) in the labels."""
        return

    def loss(self, forward: Forward, batch: Batch, progress: float) -> Loss:
        """`progress` in [0, 1]: (epoch + 1) / epochs while training, 1 while scoring."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, enough to resume exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        return


class Score(Protocol):
    """One early-pruning criterion. It leaves parameters, buffers, mode and random state of `model` untouched.

    One that never consults `objective` says so by `follows_objective: ClassVar[bool] = False`: its mask under cross
    entropy alone is then known to be the same. `follows_data = False`: it is the same for other images, so that nothing
    is averaged. `signed = True`: its sign is a part of the ranking, so that averaging keeps it.
    """

    def __call__(self, model: "nn.Module", batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws from `batches` what it needs; `objective` has begun with purpose "score"."""


@runtime_checkable
class Batches(Protocol):
    """A split that can be passed over again and again; epoch `number` always gives the same batches.

    `size` : images.  `num_classes` : 0 where nobody says how many there are.
    """

    size: int
    num_classes: int

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        """The batches of epoch `number`, with what `needs` asks for."""


class EpsdError(Exception):
    """A user's mistake or an unfit input: shown as one line, without a traceback."""
