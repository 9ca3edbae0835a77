"""Pure measures: accuracy, calibration, parameters and FLOPs. Fractions are in [0, 1].

One multiply-accumulate counts as two FLOPs (a product and a sum); many papers print multiply-accumulates, half of
our figure, under the name FLOPs: torchvision's ResNet-50 at 224 px is 4.09 G of those and 8.18 GFLOPs here.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from epsd.compute import networks


class ReliabilityTable(NamedTuple):
    """Calibration by confidence; all of shape (bins,) float64. Empty bins have confidence and accuracy 0.

    `lower` and `upper`: edges, the upper one belongs to the bin; `images`: predictions in it; `confidence`: their mean
    largest probability; `accuracy`: the share of them that is right.
    """

    lower: Tensor
    upper: Tensor
    images: Tensor
    confidence: Tensor
    accuracy: Tensor

    def ece(self) -> float:
        """Expected calibration error: mean over predictions of |accuracy - confidence| of their bin."""
        total = self.images.sum().clamp(min=1)
        return float((self.images * (self.accuracy - self.confidence).abs()).sum() / total)


class Parameters(NamedTuple):
    """`total` parameters of all kinds; `nonzero` of them; `prunable` weights; `kept`, the nonzero among those."""

    total: int
    nonzero: int
    prunable: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Share of prunable weights that are exactly zero, [0, 1]."""
        return 1 - self.kept / self.prunable if self.prunable else 0.0

    @property
    def compression(self) -> float:
        """Compression ratio: all parameters / nonzero parameters, >= 1."""
        return self.total / max(self.nonzero, 1)


class Flops(NamedTuple):
    """FLOPs of one image's forward pass (2 per multiply-accumulate). `sparse`: without products by exact zeros."""

    dense: int
    sparse: int


def topk(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k largest logits. `logits` (N, K), `labels` (N,).

    k above K is read as K: with three classes top-5 is 1.
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return float((best == labels[:, None]).any(dim=1).double().mean())


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats. `logits` (N, K), `labels` (N,)."""
    return float(F.cross_entropy(logits.double(), labels))


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> ReliabilityTable:
    """Predictions sorted into `bins` equal widths of confidence, (0, 1/n], (1/n, 2/n], ...

    The definition of Guo et al. (ICML 2017), which PS-KD's code uses with 10 bins; 15 is Guo's number.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    index = torch.bucketize(confidence, edges[1:-1])

    def total(values: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add(0, index, values.double())

    count = total(torch.ones_like(confidence))
    mean = total(confidence) / count.clamp(min=1)
    return ReliabilityTable(edges[:-1], edges[1:], count, mean, total(predicted == labels) / count.clamp(min=1))


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error over `bins` equal-width bins, [0, 1]."""
    return reliability(logits, labels, bins).ece()


def brier(logits: Tensor, labels: Tensor) -> float:
    """Brier score: mean over rows of Σ_k (p_k − [k is the label])², [0, 2]. `logits` (N, K), `labels` (N,).

    The sum over all classes, as Brier (1950) has it; some libraries halve it for two classes.
    """
    onehot = F.one_hot(labels, logits.shape[1]).double()
    return float((logits.double().softmax(dim=1) - onehot).square().sum(dim=1).mean())


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, K) int64: row = true class, column = predicted class."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2).reshape(classes, classes)


class ByClass(NamedTuple):
    """All of shape (K,) float64. `recall`: right / all of that class, NaN for a class without images. `precision`:
    right / all that was taken for it, NaN where nothing was. `f1`: their harmonic mean, NaN for a class without both.
    """

    recall: Tensor
    precision: Tensor
    f1: Tensor

    def averages(self) -> dict[str, float]:
        """balanced_accuracy (mean recall), macro_f1, lowest_recall; of classes that have one, as scikit-learn."""
        recall = self.recall[~self.recall.isnan()]
        means = {"balanced_accuracy": float(recall.mean()), "macro_f1": float(self.f1.nanmean())}
        return means | {"lowest_recall": float(recall.min())}


def by_class(table: Tensor) -> ByClass:
    """From a confusion matrix (K, K), rows true, columns predicted."""
    right, actual, taken = table.diagonal().double(), table.sum(dim=1), table.sum(dim=0)
    return ByClass(right / actual, right / taken, 2 * right / (actual + taken))


def count_parameters(model: nn.Module, prunable: Mapping[str, nn.Parameter]) -> Parameters:
    """Counts from the weights themselves, whatever any mask says. `prunable`: `epsd.masks.prunable(model)`."""
    nonzero = {name: int(parameter.detach().count_nonzero()) for name, parameter in model.named_parameters()}
    return Parameters(
        total=sum(parameter.numel() for parameter in model.parameters()),
        nonzero=sum(nonzero.values()),
        prunable=sum(parameter.numel() for parameter in prunable.values()),
        kept=sum(nonzero[name] for name in prunable),
    )


def densities(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each tensor's entries that are not exactly zero, by name."""
    return {name: int(weight.detach().count_nonzero()) / weight.numel() for name, weight in weights.items()}


class _Skippable(TorchFunctionMode):
    """Counts `saved`: twice the products by entries of `weights` that are exactly zero, of all calls in the block.

    Wherever they are called from: some networks multiply by a layer's weight without calling the layer. Attention of
    `nn.MultiheadAttention`, whose products are out of sight here, is counted layer by layer (`attention`).
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._zeros = {id(weight): int((weight.detach() == 0).sum()) for weight in weights}
        self.saved = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            image, weight = (args[place] if len(args) > place else (kwargs or {})[name] for place, name in _PLACES)
            side = image if func in _TRANSPOSED else result  # the one whose channels are the weight's first dimension
            self._count(weight, side.numel() // weight.shape[0])
        return result

    def _count(self, weight: Tensor | None, uses: int) -> None:
        self.saved += 2 * uses * self._zeros.get(id(weight), 0)

    def attention(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook."""
        if isinstance(module, nn.MultiheadAttention):
            for weight in (module.in_proj_weight, module.out_proj.weight):
                self._count(weight, inputs[0].numel() // module.embed_dim)


_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED}
_PLACES = (0, "input"), (1, "weight")


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the block: torch's counter trips over those that meet none."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def _recurrent_in_parts(model: nn.Module) -> Iterator[None]:
    """The counter does not see into the kernels of whole LSTMs, only into the products that they consist of."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of Intel GPUs that are not there
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield


def flops(model: nn.Module, image_shape: Sequence[int]) -> Flops:
    """FLOPs of the forward pass of one image (C, H, W): matrix products and convolutions, attention included.

    Recurrent layers are counted, too. Normalisation, activation, pooling and biases are not (about 1 % of a ResNet),
    nor are products inside kernels of other libraries (deformable convolutions). `sparse` leaves out the
    products by weights that are exactly zero, of every convolution, linear map and MultiheadAttention: what a kernel
    that skips every zero would do, not what a dense one does.
    """
    from torch.utils.flop_counter import FlopCounterMode

    skippable = _Skippable(model.parameters())
    image = networks.as_weights(torch.zeros(1, *image_shape, device=next(model.parameters()).device), model)
    counter = FlopCounterMode(display=False)
    with (
        networks.in_mode(model),
        networks.hooked((module, skippable.attention) for module in model.modules()),
        _without_gradients(model),
        networks.plain_attention(),  # the counter does not see into the others
        _recurrent_in_parts(model),
        torch.no_grad(),
        counter,
        skippable,
    ):
        model(image)
    dense = int(counter.get_total_flops())
    return Flops(dense, dense - skippable.saved)
