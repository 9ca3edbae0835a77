"""Accuracy and calibration against figures worked out by hand; parameters and FLOPs against published ones."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsd.architectures.resnet import ResNet
from epsd.evaluation import metrics


def logits_of(rows: list[list[float]]) -> Tensor:
    """Logits whose softmax is `rows`."""
    return torch.tensor(rows, dtype=torch.float64).log()


FOUR = logits_of([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.05, 0.15, 0.8]])
LABELS = torch.tensor([0, 1, 1, 0])


def test_topk_counts_labels_among_the_best() -> None:
    assert metrics.topk(FOUR, LABELS, 1) == 0.5
    assert metrics.topk(FOUR, LABELS, 2) == 0.75
    assert metrics.topk(FOUR, LABELS, 5) == 1.0


def test_nll_is_the_mean_of_minus_log_probability() -> None:
    expected = -sum(math.log(p) for p in (0.9, 0.3, 0.5, 0.05)) / 4
    assert metrics.nll(FOUR, LABELS) == pytest.approx(expected, rel=1e-12)


def test_ece_by_hand() -> None:
    rows = logits_of([[0.5, 0.3, 0.2], [0.61, 0.3, 0.09], [0.9, 0.05, 0.05], [0.95, 0.03, 0.02]])
    labels = torch.tensor([0, 1, 0, 2])
    expected = (1 * abs(1 - 0.5) + 1 * abs(0 - 0.61) + 2 * abs(0.5 - 0.925)) / 4
    assert metrics.ece(rows, labels, bins=5) == pytest.approx(expected, rel=1e-12)


def test_ece_is_zero_for_a_calibrated_network() -> None:
    rows = logits_of([[0.75, 0.25]] * 4)
    assert metrics.ece(rows, torch.tensor([0, 0, 0, 1]), bins=15) == pytest.approx(0, abs=1e-12)


def test_ece_of_one_bin_is_the_gap_between_accuracy_and_mean_confidence() -> None:
    assert metrics.ece(FOUR, LABELS, bins=1) == pytest.approx(abs(0.5 - (0.9 + 0.6 + 0.5 + 0.8) / 4), rel=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    sure = torch.tensor([[100.0, -100.0, 0.0, 0.0]], dtype=torch.float64)  # confidence exactly 1
    even = torch.zeros(1, 4, dtype=torch.float64)  # exactly 0.25, an edge of four bins
    table = metrics.reliability(torch.cat([sure, even]), torch.tensor([0, 1]), bins=4)
    assert table.images.tolist() == [1, 0, 0, 1]
    assert table.upper[-1] == 1


def test_reliability_table_adds_up() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 7), torch.randint(7, (500,))
    table = metrics.reliability(logits, labels, bins=10)
    assert table.images.sum() == 500
    share = table.images / 500
    assert float((share * table.accuracy).sum()) == pytest.approx(metrics.topk(logits, labels))
    inside = table.images > 0
    assert bool(((table.confidence > table.lower) & (table.confidence <= table.upper))[inside].all())


def test_confusion_and_per_class_accuracy() -> None:
    table = metrics.confusion(FOUR, LABELS)
    assert table.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    found = metrics.by_class(table)
    assert found.recall[:2].tolist() == [0.5, 0.5] and found.precision.tolist() == [0.5, 1, 0]
    assert math.isnan(found.recall[2])


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_skewed_data_are_those_of_scikit_learn(seed: int) -> None:
    """Most images of one class, one class without any, one that is never predicted."""
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(seed)
    labels = torch.cat([torch.zeros(80, dtype=torch.int64), torch.randint(4, (40,))])
    logits = torch.randn(120, 6)
    logits[:, 5] = -9
    predicted = logits.argmax(1)
    found = metrics.by_class(metrics.confusion(logits, labels)).averages()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions of a class that is not there
        assert found["balanced_accuracy"] == pytest.approx(sklearn.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"))
    recall = sklearn.recall_score(labels, predicted, average=None, labels=[0, 1, 2, 3])
    assert found["lowest_recall"] == pytest.approx(min(recall))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))


def test_parameters_are_recounted_from_the_weights() -> None:
    net = small_net()
    weights = {"0.weight": net[0].weight, "2.weight": net[2].weight}
    with torch.no_grad():
        net[0].weight.flatten()[:200] = 0
        net[2].bias[:2] = 0
    count = metrics.count_parameters(net, weights)
    assert (count.total, count.nonzero) == (216 + 8 + 640 + 5, 216 + 8 + 640 + 5 - 202)
    assert (count.prunable, count.kept) == (856, 656)
    assert count.sparsity == pytest.approx(200 / 856)
    assert count.compression == pytest.approx(869 / 667)


def test_flops_by_hand_dense_and_sparse() -> None:
    net = small_net()
    with torch.no_grad():
        net[0].weight[4:] = 0  # half of the filters
    dense, sparse = metrics.flops(net, (3, 4, 4))
    assert dense == 2 * (216 * 16 + 640)
    assert sparse == 2 * (108 * 16 + 640)


def test_flops_do_not_depend_on_the_masked_layer_being_grouped_or_transposed() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 2, stride=2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    dense, sparse = metrics.flops(net, (4, 6, 6))
    assert dense == 2 * (36 * 16 + 32 * 16)
    assert sparse == 0


@pytest.mark.parametrize(("depth", "giga"), [(18, 1.814), (50, 4.089)])
def test_flops_of_the_published_resnets(depth: int, giga: float) -> None:
    net = ResNet(depth=depth, stem="imagenet")(1000, (3, 224, 224))
    assert metrics.flops(net, (3, 224, 224)).dense / 2e9 == pytest.approx(giga, abs=1e-3)


class Borrowing(nn.Module):
    """Multiplies by its layer's weight without calling the layer, as Swin transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), weight=self.inner.weight, bias=self.inner.bias)


def test_flops_find_zeros_wherever_a_weight_is_used() -> None:
    net = Borrowing()
    with torch.no_grad():
        net.inner.weight[1:] = 0
    assert metrics.flops(net, (2, 2, 2)) == (2 * 32, 2 * 8)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_flops_of_weights_that_are_computed_anew_are_dense() -> None:
    """What is zero in the parameter need not be in what convolves."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    net.parametrizations.weight.original1.data[1:] = 0.0
    net.parametrizations.weight.original1.data[1:, 0] = 1.0
    dense, sparse = metrics.flops(nn.Sequential(nn.Flatten(), net), (2, 2, 2))
    assert dense == sparse == 2 * 32


def test_flops_of_a_token_that_meets_no_gradient() -> None:
    """As CaiT's class token does, over which torch's own counter trips."""

    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Parameter(torch.zeros(1, 4)), nn.Sequential(nn.Linear(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.token)

    assert metrics.flops(Token(), (1, 2, 2)).dense == 2 * 8


def test_flops_of_a_vit_include_its_attention() -> None:
    import torchvision

    net = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
    tokens, width = 17, 64
    projections = 4 * tokens * width**2 + 2 * tokens * width * 128
    products = 2 * tokens * tokens * width
    stem, head = 16 * width * 3 * 64, width * 10
    dense, sparse = metrics.flops(net, (3, 32, 32))
    assert dense == 2 * (2 * (projections + products) + stem + head)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert metrics.flops(net, (3, 32, 32)).sparse == 2 * 2 * products
    assert sparse == pytest.approx(dense, rel=0.05)  # its head starts at zero


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_flops_of_recurrent_layers(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """Every weight meets every step of the sequence, here of the 6 rows."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = kind(8, 16, batch_first=True, **options)

        def forward(self, images: Tensor) -> Tensor:
            return self.rows(images.flatten(1, 2))[0][:, -1]

    net = Reader()
    weights = sum(p.numel() for name, p in net.named_parameters() if "weight" in name)
    assert metrics.flops(net, (1, 6, 8)) == (2 * 6 * weights, 2 * 6 * weights)


def test_flops_leave_mode_and_hooks_alone() -> None:
    net = small_net().train()
    net[1].eval()
    metrics.flops(net, (3, 4, 4))
    assert [module.training for module in net] == [True, False, True]
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_densities() -> None:
    assert metrics.densities({"a": torch.tensor([0.0, 1.0, 2.0, 0.0])}) == {"a": 0.5}
