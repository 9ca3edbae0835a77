"""evaluate() on a network whose answers are known; costs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from epsd.compute import timing
from epsd.evaluation import evaluate as evaluation
from epsd.types import Batch, BatchNeeds


class Fixed:
    """Batches whose images are the logits themselves, (N, K, 1, 1)."""

    def __init__(self, logits: Tensor, labels: Tensor, batch_size: int = 3):
        self.size, self.num_classes, self.batch_size = len(labels), logits.shape[1], batch_size
        self.logits, self.labels = logits, labels

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def epoch(self, number: int, needs: BatchNeeds = BatchNeeds()) -> Iterator[Batch]:
        assert number == 0
        for some in torch.arange(self.size).split(self.batch_size):
            yield Batch(self.logits[some, :, None, None], self.labels[some], some)


class Echo(nn.Module):
    """Logits = images. Counts passes, and remembers in which mode they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.scale * x.flatten(1)


LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 0, 2])


def test_figures_of_a_known_network() -> None:
    net = Echo().train()
    result = evaluation.evaluate(net, Fixed(LOGITS, LABELS), ece_bins=10)
    assert result.metrics["top1"] == 0.75
    assert "top5" not in result.metrics, "of three classes it says nothing"
    assert result.metrics["balanced_accuracy"] == pytest.approx(2.5 / 3) and result.metrics["lowest_recall"] == 0.5
    assert result.metrics["nll"] == pytest.approx(float(nn.functional.cross_entropy(LOGITS, LABELS)), rel=1e-6)
    assert result.metrics["ece"] == pytest.approx(result.reliability.ece())
    assert result.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert result.per_class.recall.tolist() == [0.5, 1, 1]
    assert net.modes == [False, False]  # each image once, in evaluation mode
    assert net.training


def test_a_loader_is_judged_like_prepared_batches() -> None:
    loader = DataLoader(TensorDataset(LOGITS[:, :, None, None], LABELS), batch_size=3)
    assert evaluation.evaluate(Echo(), loader).metrics == evaluation.evaluate(Echo(), Fixed(LOGITS, LABELS)).metrics


def test_batch_size_changes_nothing() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    results = [evaluation.evaluate(Echo(), Fixed(logits, labels, size)).metrics for size in (7, 50)]
    assert results[0] == results[1]


def test_outputs_that_are_no_numbers_are_refused() -> None:
    broken = LOGITS.clone()
    broken[1, 0] = float("nan")
    with pytest.raises(evaluation.EvaluationError, match="1 of 4"):
        evaluation.evaluate(Echo(), Fixed(broken, LABELS))


def test_a_split_without_images_is_refused() -> None:
    with pytest.raises(evaluation.EvaluationError, match="no images"):
        evaluation.evaluate(Echo(), Fixed(LOGITS[:0], LABELS[:0]))


def test_rows_of_the_tables() -> None:
    names = ["a", "b", "c", "d"]
    logits = torch.cat([LOGITS, torch.full((4, 1), -9.0)], dim=1)
    result = evaluation.evaluate(Echo(), Fixed(logits, LABELS), ece_bins=2)
    rows = list(evaluation.per_class_rows(result, names))
    assert rows[:3] == [("a", 2, 0.5, 1.0, 2 / 3), ("b", 1, 1.0, 0.5, 2 / 3), ("c", 1, 1.0, 1.0, 1.0)]
    assert rows[3] == ("d", 0, "", "", "")
    assert evaluation.recalls(rows) == {"a": 0.5, "b": 1.0, "c": 1.0}
    pairs = list(evaluation.confusion_rows(result, names))
    assert sorted(pairs) == [("a", "a"), ("a", "b"), ("b", "b"), ("c", "c")]
    bins = list(evaluation.reliability_rows(result))
    assert [row[:3] for row in bins] == [(0.0, 0.5, 0.0), (0.5, 1.0, 4.0)]


def test_cost_and_the_dense_twin() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    weights = {"0.weight": net[0].weight, "2.weight": net[2].weight}
    with torch.no_grad():
        net[0].weight[:2] = 0
    cost = evaluation.cost(net, (1, 4, 4), weights)
    assert cost["sparsity"] == pytest.approx(18 / 68)
    assert cost["density"] == pytest.approx(50 / 68)
    assert cost["compression"] == pytest.approx(74 / 56)
    assert cost["gflops_dense"] == pytest.approx(2e-9 * (36 * 4 + 32))
    assert cost["gflops_sparse"] == pytest.approx(2e-9 * (18 * 4 + 32))
    twin = timing.filled(net)
    assert evaluation.cost(twin, (1, 4, 4), {name: twin.get_parameter(name) for name in weights})["sparsity"] == 0
    assert torch.equal(twin[2].weight, net[2].weight)
    assert not net[0].weight[:2].any()
