"""Weights of classes by how rare they are, from any source of batches."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from epsd.data.balance import weighed
from epsd.data.loaders import as_batches
from epsd.data.prepared import Prepared
from epsd.masks import prunable
from epsd.objectives import OBJECTIVES
from epsd.preparing.write import prepare
from epsd.project.recipes import Recipe
from epsd.pruning.prune import prune
from epsd.scores import SCORES
from epsd.training.fit import fit
from epsd.types import EpsdError
from preparing.test_write import arrays
from toys import ToyBatches, convnet

RARE = torch.tensor([0] * 30 + [1] * 12 + [2] * 6)


def skewed() -> DataLoader:  # type: ignore[type-arg]
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(48, 1, 4, 4), RARE), batch_size=12)


def test_auto_is_by_frequency() -> None:
    """As scikit-learn's "balanced"."""
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    objective = OBJECTIVES["cskd"](class_weights="auto")
    found = weighed(objective, as_batches(skewed()))
    expected = sklearn.compute_class_weight("balanced", classes=RARE.unique().numpy(), y=RARE.numpy())
    assert found.class_weights == pytest.approx(list(expected))  # type: ignore[attr-defined]
    assert objective.class_weights == "auto", "the user's own stays as it is"  # type: ignore[attr-defined]


def test_a_class_that_is_not_there_counts_for_nothing() -> None:
    source = as_batches(skewed(), num_classes=4)
    weights = weighed(OBJECTIVES["cross_entropy"](class_weights="auto"), source).class_weights  # type: ignore[attr-defined]
    assert weights[3] == 1.0 and weights[:3] == pytest.approx([48 / 90, 48 / 36, 48 / 18])


def test_prepared_images_are_counted(tmp_path: Path) -> None:
    prepare(arrays(60), tmp_path, validation=0.2, test=0.2)
    data = Prepared.load(tmp_path)
    batches = data.batches("train", batch_size=8)
    weights = weighed(OBJECTIVES["pskd"](class_weights="auto"), batches).class_weights  # type: ignore[attr-defined]
    counts = torch.bincount(torch.from_numpy(data.labels("train")))
    assert weights == pytest.approx((counts.sum() / (2 * counts.double())).tolist())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_training_and_scoring_take_them(name: str) -> None:
    """The same network, trained and pruned as by the weights in numbers; without them it is another one."""
    found = []
    for weights in ("auto", [48 / 90, 48 / 36, 48 / 18], None):
        model, objective = convnet(), OBJECTIVES[name](class_weights=weights)
        mask = prune(model, skewed(), score=SCORES["epsd"](steps=1), sparsity=0.5, objective=objective)
        history = fit(model, skewed(), objective=objective, mask=mask, recipe=Recipe(epochs=1))
        found.append((mask.digest(), history[0]["train/loss"]))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert found[0][1] != found[2][1]
    assert prunable(model)


class _Bare:
    """Batches of one's own that do not tell their labels."""

    def __init__(self) -> None:
        toy = ToyBatches()
        self.size, self.num_classes, self.epoch, self._count = toy.size, toy.num_classes, toy.epoch, len(toy)

    def __len__(self) -> int:
        return self._count


def test_what_cannot_be_weighted_is_told() -> None:
    with pytest.raises(EpsdError, match=r"objective\.class_weights: auto counts labels, which these batches do not"):
        fit(convnet(), _Bare(), objective=OBJECTIVES["cross_entropy"](class_weights="auto"), recipe=Recipe(epochs=1))
    with pytest.raises(EpsdError, match=r"objective\.class_weights: 2 weights for 3 classes"):
        fit(convnet(), ToyBatches(), objective=OBJECTIVES["dlb"](class_weights=[1.0, 2.0]), recipe=Recipe(epochs=1))
