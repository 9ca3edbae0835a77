"""Targets that are no classes: probabilities, several labels, numbers; a loss and a metric of one's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from epsd.compute import distributed
from epsd.evaluation.evaluate import EvaluationError, evaluate
from epsd.losses import cross_entropy
from epsd.masks import Mask
from epsd.objectives import OBJECTIVES
from epsd.project import progress
from epsd.project.recipes import Recipe
from epsd.pruning.prune import prune, scored
from epsd.pruning.scoring import MetaGradientError
from epsd.scores import SCORES
from epsd.training.fit import fit
from epsd.training.record import History, TrainingError, judged_by
from epsd.types import EpsdError
from toys import ToyBatches, convnet

DATA = ToyBatches(size=36)
RECIPE = Recipe(epochs=2, lr=0.05)


def loader(targets: Tensor, **more: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(DATA.images, targets), batch_size=12, shuffle=True, **more)


def soft() -> Tensor:
    return nn.functional.one_hot(DATA.labels, 3).double()  # another type than that of the outputs


@pytest.mark.parametrize("name", ["cross_entropy", "pskd", "dlb"])
def test_one_hot_probabilities_are_the_classes(name: str) -> None:
    """The same mask and the same training, in whatever type they come."""
    found = []
    for targets in (DATA.labels, soft()):
        model, objective = convnet(), OBJECTIVES[name]()
        mask = prune(model, loader(targets), score=SCORES["epsd"](steps=2), sparsity=0.6, objective=objective)
        history = fit(model, loader(targets), mask=mask, objective=objective, recipe=RECIPE, validation=loader(targets))
        found.append((mask, history, model.state_dict()))
    (one, first, weights), (two, second, other) = found
    assert one == two
    assert [r["train/loss"] for r in first] == pytest.approx([r["train/loss"] for r in second], rel=1e-5)
    assert all(torch.allclose(weights[key], other[key], atol=1e-5) for key in weights)
    assert first[-1]["val/nll"] == pytest.approx(second[-1]["val/loss"], rel=1e-5)
    assert "train/top1" in first[-1] and "train/top1" not in second[-1]


def test_mixed_labels_pull_towards_both() -> None:
    model = convnet()
    even = torch.tensor([0.5, 0.5, 0.0]).expand(36, 3)
    fit(model, loader(even), recipe=Recipe(epochs=30, lr=0.05))
    with torch.no_grad():
        shares = model(DATA.images).softmax(1).mean(0)
    assert shares[:2].tolist() == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_metric_of_ones_own_is_of_all_outputs_at_once() -> None:
    targets = DATA.images.mean(dim=(1, 2, 3)).view(-1, 1)

    def spread(outputs: Tensor, wanted: Tensor) -> float:
        assert len(outputs) == len(wanted) == 36
        return float((outputs - wanted).std())

    def worst(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).abs().max()

    model, metrics = convnet(classes=1), {"spread": spread, "worst": worst}
    judged = DataLoader(TensorDataset(DATA.images, targets), batch_size=12)
    how: dict[str, Any] = {"objective": nn.MSELoss(), "recipe": RECIPE, "validation": judged}
    history = fit(model, loader(targets), metrics=metrics, **how)
    with torch.no_grad():
        outputs = model(DATA.images)
    for name, metric in metrics.items():
        assert history[-1][f"val/{name}"] == pytest.approx(float(metric(outputs, targets)), rel=1e-4)
    assert not {"val/top1", "val/nll", "train/top1"} & history[-1].keys()
    assert evaluate(model, judged, metrics=metrics) == pytest.approx(
        {name: history[-1][f"val/{name}"] for name in metrics}, rel=1e-4
    )
    plain = fit(convnet(classes=1), loader(targets), **how)
    assert plain[-1]["val/loss"] > 0
    with pytest.raises(TrainingError, match="best is told by top-1"):
        fit(model, loader(targets), objective=nn.MSELoss(), recipe=Recipe(keep="best", epochs=1), validation=judged)


@pytest.mark.parametrize("name", ["snip", "prospr", "epsd", "grasp"])
def test_every_score_differentiates_a_loss_on_several_labels(name: str) -> None:
    targets = (torch.rand(36, 4) > 0.5).float()
    settings = {"samples_per_class": None} if name == "grasp" else {}
    model, loss = convnet(classes=4), nn.BCEWithLogitsLoss()
    mask = prune(model, loader(targets), score=SCORES[name](**settings), sparsity=0.6, objective=loss)
    fit(model, loader(targets), mask=mask, objective=loss, recipe=Recipe(epochs=1))
    assert not any(model.get_parameter(key)[~keep].any() for key, keep in mask.keep.items())


def test_labels_that_a_loss_does_not_take_are_told() -> None:
    numbers = torch.rand(36)
    with pytest.raises(
        EpsdError, match=r"labels are float32 \d+ for logits \d+ x 3: cross entropy takes integers \(B,\)"
    ):
        fit(convnet(), loader(numbers), recipe=RECIPE)
    with pytest.raises(EpsdError, match=r"labels are int64 \d+ x 1 for logits"):
        fit(convnet(), loader(DATA.labels[:, None]), recipe=RECIPE)
    with pytest.raises(EpsdError, match="integer label"):
        fit(convnet(), loader(soft()), objective=OBJECTIVES["cskd"](), recipe=RECIPE)
    with pytest.raises(MetaGradientError, match="samples_per_class=None takes whole batches"):
        prune(convnet(), loader(soft()), score=SCORES["grasp"](), sparsity=0.5)
    with pytest.raises(EvaluationError, match="pass metrics of your own"):
        evaluate(convnet(), loader(soft()))
    assert cross_entropy(torch.zeros(2, 3), torch.full((2, 3), 1 / 3)) == pytest.approx(torch.log(torch.tensor(3.0)))


def test_a_list_of_batches_trains_as_its_source_does() -> None:
    made = list(DATA.epoch(0))
    results = []
    for given in (made, iter(made)):
        model = convnet()
        history = fit(model, given, recipe=RECIPE, validation=made)
        results.append((history[-1]["train/loss"], model[0].weight.detach().clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_a_history_is_one_line() -> None:
    history = fit(convnet(), DATA, recipe=RECIPE, validation=DATA)
    assert isinstance(history, list) and str(history).count("\n") == 0
    assert str(history).startswith("History of 2 epochs: train/loss ") and "val/top1" in str(history)
    assert str(History()) == "History of no epoch"


class Reader(nn.Module):
    """An LSTM and a layer behind it, for (B, 5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, series: Tensor) -> Tensor:
        last: Tensor = self.head(self.lstm(series)[0][:, -1])
        return last


SERIES = DataLoader(TensorDataset(torch.randn(36, 5, 6), DATA.labels), batch_size=12)
MATRICES = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"]


@pytest.mark.parametrize("name", ["epsd", "snip", "magnitude", "synflow", "random"])
def test_layers_of_any_kind_are_pruned_where_they_are_named(name: str) -> None:
    """Their matrices; the mask holds in training, and is that of the network afterwards."""
    model = Reader()
    mask = prune(model, SERIES, score=SCORES[name](), sparsity=0.5, include=["lstm", "head"])
    assert list(mask.keep) == MATRICES and mask.kept == mask.total // 2
    assert not hasattr(model, "epsd_also")
    fit(model, SERIES, mask=mask, recipe=Recipe(epochs=1))
    assert Mask.of(model, MATRICES) == mask
    assert list(scored(model, SERIES, score=SCORES[name](), include="lstm.weight_hh_l0")) == [MATRICES[1]]


def test_a_score_of_ones_own_covers_what_it_scores() -> None:
    def all_but_biases(model: nn.Module, batches: object, objective: object) -> dict[str, Tensor]:
        return {name: p.detach().abs() for name, p in model.named_parameters() if "bias" not in name}

    def somewhere(model: nn.Module, batches: object, objective: object) -> dict[str, Tensor]:
        return {"nowhere": torch.ones(2), **all_but_biases(model, batches, objective)}

    assert list(prune(Reader(), SERIES, score=all_but_biases, sparsity=0.5).keep) == MATRICES
    chosen = prune(Reader(), SERIES, score=all_but_biases, sparsity=0.5, exclude="lstm.weight_hh_l0")
    assert list(chosen.keep) == [MATRICES[0], MATRICES[2]]
    with pytest.raises(EpsdError, match="the score gives 'nowhere', which is no trainable parameter"):
        prune(Reader(), SERIES, score=somewhere, sparsity=0.5)


def test_metrics_are_of_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However these share them: one of the two has more batches here."""
    batches = [(torch.full((2, 1), float(number)), torch.zeros(2)) for number in range(3)]
    monkeypatch.setattr(distributed, "interleaved", lambda mine: [*mine, batches[1:]])
    found = judged_by(
        {"images": lambda outputs, labels: float(len(labels)), "mean": lambda o, _: o.mean()}, batches[:1]
    )
    assert found == {"images": 6.0, "mean": 1.0}
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="no batch to judge"):
        judged_by({}, [])


def test_the_bar_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It draws on stderr where somebody watches, and only where it is wanted."""
    monkeypatch.setattr(progress, "watched", lambda: True)
    shown = []
    for wanted in (True, False):
        fit(convnet(), DATA, recipe=Recipe(epochs=1), progress=wanted)
        shown.append(capsys.readouterr())
    assert shown[0].err and shown[1].err == "" and shown[0].out == shown[1].out == ""
