"""What every loop asks of a network: prune, fit and evaluate each work with it, or say in one line why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from epsd.compute.networks import in_mode, resting
from epsd.evaluation.evaluate import evaluate
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.pruning.prune import prune
from epsd.scores import SCORES
from epsd.training.fit import fit
from epsd.types import EpsdError
from toys import ToyBatches, convnet

DATA = ToyBatches()
ONCE = Recipe(epochs=1, lr=0.01, precision="fp32")
CALLS: dict[str, Callable[..., Any]] = {
    "prune": lambda model, **other: prune(model, DATA, score=SCORES["epsd"](), sparsity=0.5, **other),
    "fit": lambda model, **other: fit(model, DATA, recipe=ONCE, **other),
    "evaluate": lambda model: evaluate(model, DATA),
}
each = pytest.mark.parametrize("call", sorted(CALLS))


class Pair(nn.Module):
    """Gives its logits twice, as `form` puts them together."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.form = convnet(), form

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        return self.form(logits, 2 * logits)


@each
@pytest.mark.parametrize(("form", "kind"), [(lambda a, b: (a, b), "tuple"), (lambda a, b: {"a": a, "b": b}, "dict")])
def test_several_outputs_are_told(call: str, form: Callable[..., Any], kind: str) -> None:
    with pytest.raises(EpsdError, match=rf"the network gives {kind}, not logits \(B, K\): wrap it"):
        CALLS[call](Pair(form))


@each
def test_layers_without_weights_are_told(call: str) -> None:
    with pytest.raises(EpsdError, match=r"no weights yet \(1\.weight, \.\.\.\): pass one batch"):
        CALLS[call](nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))


@each
def test_a_double_network_takes_what_a_loader_gives(call: str) -> None:
    """With the results of images that are double, too."""
    torch.manual_seed(0)
    given = CALLS[call](convnet(dtype=torch.float64))
    wide = ToyBatches()
    wide.images = wide.images.double()
    apart = {
        "prune": lambda: prune(convnet(dtype=torch.float64), wide, score=SCORES["epsd"](), sparsity=0.5),
        "fit": lambda: fit(convnet(dtype=torch.float64), wide, recipe=Recipe(epochs=1, lr=0.01)),
        "evaluate": lambda: evaluate(convnet(dtype=torch.float64), wide),
    }[call]()
    if call == "fit":
        assert given[0]["train/loss"] == pytest.approx(apart[0]["train/loss"], rel=1e-6)
    else:
        assert given == apart if call == "prune" else given.metrics == pytest.approx(apart.metrics, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_scored_and_judged_but_not_trained(dtype: torch.dtype) -> None:
    assert CALLS["prune"](convnet(dtype=dtype)).kept
    assert CALLS["evaluate"](convnet(dtype=dtype)).metrics["nll"] > 0
    with pytest.raises(EpsdError, match=rf"the weights are {str(dtype)[6:]}, in which small steps vanish"):
        CALLS["fit"](convnet(dtype=dtype))


def test_double_weights_are_not_computed_with_in_half() -> None:
    with pytest.raises(EpsdError, match=r"train\.precision: bf16 is for weights in single precision"):
        fit(convnet(dtype=torch.float64), DATA, recipe=Recipe(epochs=1, precision="bf16"))


def test_nothing_to_learn_is_told() -> None:
    with pytest.raises(EpsdError, match="no parameter of the network is trainable"):
        CALLS["fit"](convnet().requires_grad_(False))
    with pytest.raises(EpsdError, match="no prunable weight"):
        CALLS["prune"](convnet().requires_grad_(False))
    assert CALLS["evaluate"](convnet().requires_grad_(False)).metrics
    with pytest.raises(EpsdError, match="the loss does not depend on any trainable parameter"):
        CALLS["fit"](convnet(), objective=lambda logits, labels: F.cross_entropy(logits.detach(), labels))


@pytest.mark.parametrize("call", ["prune", "fit"])
def test_a_loss_that_is_no_number_is_told(call: str) -> None:
    for loss, given in (
        (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), r"a tensor \d+"),
        (lambda logits, labels: 0.5, "float"),
    ):
        with pytest.raises(EpsdError, match=f"the loss function gives {given}, not one number"):
            CALLS[call](convnet(), objective=loss)


class Lonely(nn.Module):
    """BatchNorm behind the pooling: it has one value per channel and image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images).mean((2, 3))))


def loader(images: int, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(DATA.images[:images], DATA.labels[:images]), batch_size=batch_size)


@pytest.mark.parametrize("objective", ["cross_entropy", "cskd", "dlb", "pskd"])
def test_a_last_batch_of_one_image_is_skipped_with_a_word(objective: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Where BatchNorm cannot normalise it; the loss is then that of the other batches."""
    torch.manual_seed(0)
    records = fit(Lonely(), loader(17), objective=OBJECTIVES[objective](), recipe=Recipe(epochs=2, precision="fp32"))
    assert capfd.readouterr().err.count("a batch is skipped, as BatchNorm has no variance of one value") == 1
    assert records[-1]["cost/images_forward"] % 2 == 0
    if objective == "cross_entropy":
        torch.manual_seed(0)
        without = fit(Lonely(), loader(16), recipe=Recipe(epochs=2, precision="fp32", schedule="constant"))
        torch.manual_seed(0)
        skipped = fit(Lonely(), loader(17), recipe=Recipe(epochs=2, precision="fp32", schedule="constant"))
        assert [r["train/loss"] for r in skipped] == [r["train/loss"] for r in without]
        fit(convnet(), loader(17), recipe=ONCE)
        assert "skipped" not in capfd.readouterr().err.split("skipped", 2)[-1], "the others can, of one image"


def test_batches_of_one_image_throughout_are_told() -> None:
    with pytest.raises(EpsdError, match="there is no batch to train on"):
        fit(Lonely(), loader(4, 1), recipe=ONCE)
    with pytest.raises(EpsdError, match="a scoring batch cannot be used, as BatchNorm has no variance of one value"):
        prune(Lonely(), loader(17), score=SCORES["epsd"](steps=2), sparsity=0.5)


def test_a_loss_of_ones_own_may_take_what_the_network_gives() -> None:
    """All of it; what is named `logits` is judged, where nothing is, no accuracy is told, and validation says why."""

    def both(outputs: Any, labels: Tensor) -> Tensor:
        first, second = outputs.values() if isinstance(outputs, dict) else outputs
        return F.cross_entropy(first, labels) + 0.3 * F.cross_entropy(second, labels)

    tuples, named = (Pair(form) for form in (lambda a, b: (a, b), lambda a, b: {"logits": a, "aux": b}))
    (record,) = fit(tuples, DATA, objective=both, recipe=ONCE)
    assert "train/top1" not in record
    assert record["cost/images_backward"] == record["cost/images_forward"] == DATA.size
    (judged,) = fit(named, DATA, objective=both, recipe=ONCE, validation=DATA)
    assert judged["train/loss"] == record["train/loss"]
    assert 0 <= judged["train/top1"] <= 1
    assert judged["val/top1"] == pytest.approx(evaluate(named, DATA).metrics["top1"])
    with pytest.raises(EpsdError, match="the network gives tuple, not logits"):
        fit(tuples, DATA, objective=both, recipe=ONCE, validation=DATA)


def test_what_rests() -> None:
    """What was frozen in eval mode; of a network that was evaluated before, nothing but what is frozen."""
    model = convnet()
    model.insert(6, nn.Dropout())
    model[1].eval().requires_grad_(False)
    model[4].eval()
    model[6].eval()
    assert resting(model) == [model[1], model[6]]
    model.eval()
    assert resting(model) == [model[1]]
    with in_mode(model, train=True):
        assert [name for name, module in model.named_children() if not module.training] == ["1"]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("validation", [None, DATA])
def test_a_frozen_norm_keeps_its_statistics_in_training(validation: ToyBatches | None) -> None:
    """And the network ends in eval mode, with or without validation."""
    model = convnet()
    model[1].eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    fit(model, DATA, recipe=Recipe(epochs=2, precision="fp32"), validation=validation)
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    assert int(model[4].num_batches_tracked) == 2 * len(DATA)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["epsd", "snip", "prospr", "grasp"])
def test_a_frozen_norm_normalises_by_its_statistics_in_scores(name: str) -> None:
    """As an affine layer of the same factors would."""
    settings = {"samples_per_class": 4} if name == "grasp" else {}
    model = convnet()
    norm = model[1].eval().requires_grad_(False)
    norm.running_mean.normal_(std=0.3), norm.running_var.uniform_(0.5, 2.0)

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = norm.weight / (norm.running_var + norm.eps).sqrt()

        def forward(self, x: Tensor) -> Tensor:
            return (x - norm.running_mean.view(-1, 1, 1)) * self.factor.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    apart = convnet()
    apart[1] = Affine()
    masks = [prune(net, DATA, score=SCORES[name](**settings), sparsity=0.6) for net in (model, apart)]
    assert masks[0].jaccard(masks[1]) > 0.99
    trained = prune(convnet(), DATA, score=SCORES[name](**settings), sparsity=0.6)
    assert masks[0].jaccard(trained) < 0.99
