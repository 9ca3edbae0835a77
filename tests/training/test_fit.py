"""The training loop: the mask holds, a killed run goes on bit for bit, bad losses stop it."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from epsd.compute.seeds import mix
from epsd.data.loaders import as_batches
from epsd.evaluation.evaluate import evaluate
from epsd.losses import as_objective, cross_entropy
from epsd.masks import Mask, MaskError, prunable
from epsd.objectives import OBJECTIVES
from epsd.project.recipes import Recipe
from epsd.pruning.prune import prune
from epsd.scores import SCORES
from epsd.training.checkpoints import CheckpointError, described
from epsd.training.fit import fit
from epsd.training.record import Record, TrainingError
from epsd.training.schedule import lr_at
from epsd.types import EpsdError
from toys import Killed, ToyBatches, convnet, half, mlp, net_with_dropout, stop_after, timeless

NAMES = sorted(OBJECTIVES)
QUICK = {"epochs": 3, "lr": 0.1, "schedule": "cosine"}


class Watched(ToyBatches):
    """Looks at the network before every step."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.look = look

    def epoch(self, number, needs=None):  # type: ignore[no-untyped-def, override]
        for batch in super().epoch(number, *([] if needs is None else [needs])):
            self.look()
            yield batch


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_removed_weights_are_exactly_zero_after_every_step(name: str, nesterov: bool) -> None:
    """Identity 9, under momentum, weight decay and clipping."""
    model = convnet()
    mask = half(model)
    looks = []

    def look() -> None:
        looks.append(all(not p[~mask.keep[key]].any() for key, p in prunable(model).items()))

    recipe = Recipe(**QUICK, momentum=0.9, nesterov=nesterov, weight_decay=0.1, clip_norm=1.0)
    fit(model, Watched(look), objective=OBJECTIVES[name](), mask=mask, recipe=recipe)
    look()
    assert len(looks) == 13
    assert all(looks)
    assert all(p[mask.keep[key]].all() for key, p in prunable(model).items())


@pytest.mark.parametrize(("channels", "layout"), [(4, torch.contiguous_format), (16, torch.channels_last)])
def test_images_reach_the_network_in_the_memory_format_it_can_take(channels: int, layout: torch.memory_format) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, 32, 1, stride=2), nn.Flatten(), nn.LazyLinear(3)
    )
    model(torch.zeros(2, 1, 4, 4))
    model.to(memory_format=torch.channels_last)
    seen: list[tuple[Tensor, Tensor]] = []
    model[1].register_forward_pre_hook(lambda layer, given: seen.append((given[0], layer.weight.clone())))
    fit(model, ToyBatches(), recipe=Recipe(epochs=1, precision="fp32"))
    assert seen and all(x.is_contiguous(memory_format=layout) for x, _ in seen)
    assert all(w.stride()[1] == 1 and (w.stride()[2] == 1) == (channels == 4) for _, w in seen)


@pytest.mark.parametrize("name", NAMES)
def test_removed_weights_are_plus_zero(name: str) -> None:
    """A −0 would be stored as a value by the compact file, which is bit-exact."""
    model = convnet()
    mask = half(model)
    fit(model, ToyBatches(), objective=OBJECTIVES[name](), mask=mask, recipe=Recipe(**QUICK, clip_norm=1.0))
    assert not any(torch.signbit(p[~mask.keep[key]]).any() for key, p in prunable(model).items())


def test_without_the_mask_the_same_training_uses_every_weight() -> None:
    model = convnet()
    half(model).apply_(model)
    fit(model, ToyBatches(), recipe=Recipe(**QUICK))
    assert all(p.all() for p in prunable(model).values())


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    data = ToyBatches(size=96)
    history = fit(convnet(), data, objective=OBJECTIVES[name](), recipe=Recipe(epochs=12, lr=0.05), validation=data)
    assert history[-1]["train/loss"] < 0.7 * history[0]["train/loss"]
    assert history[-1]["val/top1"] > 0.9
    assert [record["epoch"] for record in history] == [float(n) for n in range(1, 13)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("killed_after", [1, 2, 4])
def test_a_killed_training_goes_on_to_bit_identical_weights(tmp_path: Path, name: str, killed_after: int) -> None:
    """Identity 11: PS-KD's memory, DLB's last batch, momentum and dropout included."""
    recipe = Recipe(epochs=5, lr=0.1, warmup_epochs=1, schedule="cosine")
    start = net_with_dropout()
    mask = half(start)

    def train(model: nn.Module, **more: object) -> list[Record]:
        common = {"mask": mask, "recipe": recipe, "validation": ToyBatches(), "seed": 4}
        return fit(model, ToyBatches(), objective=OBJECTIVES[name](), **common, **more)

    whole = copy.deepcopy(start)
    expected = train(whole)
    torch.manual_seed(99)  # another process has another global state
    broken, path = copy.deepcopy(start), tmp_path / "last.safetensors"
    with pytest.raises(Killed):
        train(broken, checkpoint=path, mark="m", on_epoch=stop_after(killed_after))
    torch.manual_seed(100)
    resumed, seen = copy.deepcopy(start), []
    history = train(resumed, checkpoint=path, mark="m", on_epoch=seen.append)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert timeless(history) == timeless(expected)
    assert seen == history, "the records of the epochs done before are told again"


def test_the_global_random_state_is_left_alone() -> None:
    model = net_with_dropout()
    state = torch.get_rng_state()
    fit(model, ToyBatches(), recipe=Recipe(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    fit(convnet(), ToyBatches(), recipe=Recipe(epochs=1), checkpoint=path, mark="one")
    with pytest.raises(CheckpointError, match="belongs to other parameters"):
        fit(convnet(), ToyBatches(), recipe=Recipe(epochs=1), checkpoint=path, mark="two")


def test_a_checkpoint_knows_what_it_belongs_to_by_itself(tmp_path: Path) -> None:
    start, path, recipe = convnet(), tmp_path / "last.safetensors", Recipe(**QUICK)
    settings: dict[str, Any] = {"mask": half(start), "recipe": recipe, "objective": OBJECTIVES["cskd"](), "seed": 1}
    first = fit(copy.deepcopy(start), ToyBatches(), checkpoint=path, **settings)
    assert timeless(fit(copy.deepcopy(start), ToyBatches(), checkpoint=path, **settings)) == timeless(first)
    others: list[dict[str, Any]] = [
        {"mask": half(start, 0.9)}, {"mask": None}, {"recipe": Recipe(**QUICK | {"epochs": 1})}, {"seed": 2},
        {"objective": OBJECTIVES["cskd"](weight=2.0)}, {"objective": OBJECTIVES["dlb"]()},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(CheckpointError, match="belongs to other parameters"):
            fit(copy.deepcopy(start), ToyBatches(), checkpoint=path, **settings | other)
    with pytest.raises(CheckpointError, match="belongs to other parameters"):
        fit(convnet(classes=4), ToyBatches(), checkpoint=path, **settings | {"mask": None})


def test_the_mask_holds_whatever_the_checkpoint_brings(tmp_path: Path) -> None:
    """Under a mark of the caller's own, which may leave the mask out."""
    path, start = tmp_path / "last.safetensors", convnet()
    fit(copy.deepcopy(start), ToyBatches(), mask=half(start, 0.5), recipe=Recipe(epochs=1), checkpoint=path, mark="m")
    mask = half(start, 0.9)
    fit(start, ToyBatches(), mask=mask, recipe=Recipe(epochs=2), checkpoint=path, mark="m")
    assert not any(p[~mask.keep[name]].any() for name, p in prunable(start).items())


@pytest.mark.parametrize("drop_last", [False, True])
def test_validation_is_of_the_images_that_were_judged(drop_last: bool) -> None:
    """Whatever the length of the dataset says: a sampler gives a part of it, short batches are dropped."""
    data, model = ToyBatches(size=90), convnet()
    dataset, held = TensorDataset(data.images, data.labels), range(60, 85)
    validation = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(held), drop_last=drop_last)
    (record,) = fit(model, ToyBatches(), recipe=Recipe(epochs=1, precision="fp32"), validation=validation)
    judged = list(as_batches(validation, seed=mix(0, "train")).epoch(0))
    labels = torch.cat([batch.labels for batch in judged])
    assert len(labels) == (24 if drop_last else 25)
    with torch.no_grad():
        logits = model.eval()(torch.cat([batch.images for batch in judged]))
    assert record["val/top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert record["val/nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    empty = DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(range(0)))
    with pytest.raises(TrainingError, match="validation: there is no batch"):
        fit(convnet(), ToyBatches(), recipe=Recipe(epochs=1), validation=empty)


def test_the_seed_decides_the_order_of_a_loader() -> None:
    data = ToyBatches()
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=12, shuffle=True)

    def loss(seed: int) -> float:
        return fit(convnet(), loader, recipe=Recipe(epochs=1), seed=seed)[0]["train/loss"]

    assert loss(0) == loss(0) != loss(1)


def test_a_label_without_an_output_is_named() -> None:
    with pytest.raises(TrainingError, match="a label is 2: the network has no output for it"):
        fit(convnet(classes=2), ToyBatches(), recipe=Recipe(epochs=1))


def test_milestones_are_shares_of_the_epochs() -> None:
    with pytest.raises(ValidationError, match="less than 1"):
        Recipe(milestones=[100, 150])


def test_a_nan_loss_says_where_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss.calls += len(labels) == 12  # type: ignore[attr-defined]  (fewer: an estimate of the memory it needs)
        value = nn.functional.cross_entropy(logits, labels)
        return value * float("nan") if loss.calls == 7 else value  # type: ignore[attr-defined]

    loss.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="nan at epoch 2, step 3 of 4"):
        fit(convnet(), ToyBatches(), objective=loss, recipe=Recipe(epochs=3), checkpoint=path, mark="m")
    history = fit(convnet(), ToyBatches(), objective=loss, recipe=Recipe(epochs=3), checkpoint=path, mark="m")
    assert len(history) == 3
    assert loss.calls == 7 + 8, "only the epochs after the checkpoint were trained again"  # type: ignore[attr-defined]


def test_nothing_to_train_on() -> None:
    data = ToyBatches(size=8, batch_size=12)
    with pytest.raises(TrainingError, match=r"train\.batch_size"):
        fit(convnet(), data, recipe=Recipe(epochs=1))


def test_a_mask_of_another_network_is_refused_before_training() -> None:
    with pytest.raises(MaskError, match="no parameter"):
        fit(convnet(), ToyBatches(), mask=Mask({"nowhere.weight": torch.ones(3, dtype=torch.bool)}))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0] + [1.0] * 6),
        ("step", [0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    recipe = Recipe(epochs=4, lr=1.0, schedule=schedule, warmup_epochs=1, milestones=[0.5, 0.75])
    assert [lr_at(recipe, step, 2) for step in range(8)] == pytest.approx(expected, abs=1e-3)


def test_gradient_clipping_bounds_the_step() -> None:
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    fit(
        model,
        ToyBatches(batch_size=48),
        recipe=Recipe(epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-3),
    )
    moved = sum(float((p.detach() - before[key]).square().sum()) for key, p in model.named_parameters()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_the_gradient_norm_is_of_what_the_mask_leaves_before_clipping(clip_norm: float | None) -> None:
    start = convnet()
    mask, data = half(start), ToyBatches(size=24, batch_size=12)
    model, expected = copy.deepcopy(start), []
    mask.apply_(model)
    for batch in data.epoch(0):
        model.zero_grad()
        nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
        masked = [p.grad * mask.keep[name] if name in mask.keep else p.grad for name, p in model.named_parameters()]
        expected.append(float(torch.cat([gradient.flatten() for gradient in masked]).norm()))
    still = Recipe(epochs=1, lr=1e-30, momentum=0, weight_decay=0, clip_norm=clip_norm, precision="fp32")
    (record,) = fit(start, data, mask=mask, recipe=still)
    assert len(expected) == 2
    assert record["train/grad_norm"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_lower_precision_trains_too() -> None:
    history = fit(convnet(), ToyBatches(size=96), recipe=Recipe(epochs=8, lr=0.05, precision="bf16"))
    assert history[-1]["train/top1"] > 0.8


def test_a_plain_loader_works_with_every_objective() -> None:
    data = ToyBatches()
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=12, shuffle=True)
    for name in NAMES:
        history = fit(convnet(), loader, objective=OBJECTIVES[name](), recipe=Recipe(epochs=2))
        assert len(history) == 2


def test_the_memory_format_is_of_the_loop_alone() -> None:
    """Convolutions run channels_last; what the caller gets back lies in memory as it did before."""
    model, seen = convnet(), []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fit(model, ToyBatches(), recipe=Recipe(epochs=1))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_the_memory_format_changes_rounding_only() -> None:
    def after(memory_format: str) -> nn.Module:
        torch.manual_seed(0)
        model = convnet().double()
        recipe = Recipe(epochs=2, precision="fp32", memory_format=memory_format)
        fit(model, ToyBatches(dtype=torch.float64), recipe=recipe)
        return model

    pairs = zip(after("channels_last").parameters(), after("contiguous").parameters(), strict=True)
    assert all(torch.allclose(first, second, rtol=1e-9, atol=1e-12) for first, second in pairs)


class Sigmoid(nn.Module):
    """A network of one output z per image, (B, 1) or (B,), or of the two logits (0, z)."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = convnet(classes=1), form

    def forward(self, images: Tensor) -> Tensor:
        z = self.net(images)
        return {"column": z, "flat": z[:, 0], "two": torch.cat([torch.zeros_like(z), z], 1)}[self.form]


def binary(z: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(z.flatten(), labels.to(z.dtype))


@pytest.mark.parametrize("form", ["column", "flat"])
def test_one_logit_is_thresholded(form: str) -> None:
    """In training, validation and evaluation, as the two logits (0, z) under cross entropy: the same network."""
    data, recipe = ToyBatches(), Recipe(epochs=10, lr=0.05, precision="fp32")
    data.labels = (data.labels == 0).long()  # of unequal number
    one, two = Sigmoid(form), Sigmoid("two")
    ours = fit(one, data, objective=binary, recipe=recipe, validation=data)
    theirs = fit(two, data, recipe=recipe, validation=data)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("train/loss", "train/top1", "val/top1", "val/nll"):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), name
    with torch.no_grad():
        right = ((one(data.images).flatten() > 0) == data.labels.bool()).double().mean()
    assert right > 0.8
    assert ours[-1]["val/top1"] == pytest.approx(float(right))
    assert evaluate(one, data).metrics == pytest.approx(evaluate(two, data).metrics, abs=1e-5)
    assert evaluate(one, data).confusion.shape == (2, 2)


def test_one_output_is_refused_where_it_says_nothing() -> None:
    """Cross entropy over it, which is always 0; integer labels of a regression."""

    def squares(z: Tensor, labels: Tensor) -> Tensor:
        return (z.flatten() - labels).square().mean()

    for objective in OBJECTIVES.values():
        with pytest.raises(EpsdError, match=r"x 1 for .* images: cross entropy needs|a label is (1|too large)"):
            fit(Sigmoid("column"), ToyBatches(num_classes=2), objective=objective(), recipe=Recipe(epochs=1))
    for form in ("column", "flat"):
        with pytest.raises(EpsdError, match=r"the network has one output, and a label is 2: .* regression"):
            fit(Sigmoid(form), ToyBatches(), objective=squares, recipe=Recipe(epochs=1))
        with pytest.raises(EpsdError, match="the network has one output, and a label is 2"):
            evaluate(Sigmoid(form), ToyBatches())
    with pytest.raises(EpsdError, match="evaluate: a label is 2: the network has no output for it"):
        evaluate(convnet(classes=2), ToyBatches())
    with pytest.raises(EpsdError, match=r"x 6 x 4 x 4 for .* images: cross entropy needs"):
        fit(convnet()[:3], ToyBatches(), recipe=Recipe(epochs=1))


@pytest.mark.parametrize("name", ["snip", "prospr", "grasp", "epsd"])
def test_a_network_of_one_output_is_pruned_under_a_loss_of_its_own(name: str) -> None:
    """By (0, z) under cross entropy, the same mask."""
    settings = {"samples_per_class": 8} if name == "grasp" else {}
    data, masks = ToyBatches(num_classes=2), []
    for form, loss in (("column", binary), ("two", cross_entropy)):
        masks.append(prune(Sigmoid(form), data, score=SCORES[name](**settings), sparsity=0.6, objective=loss))
    assert masks[0].jaccard(masks[1]) > 0.99
    with pytest.raises(EpsdError, match="cross entropy needs logits"):
        prune(Sigmoid("column"), data, score=SCORES[name](**settings), sparsity=0.6)


def test_a_loss_of_ones_own_is_scored_by_every_score_that_has_a_loss() -> None:
    """SNIP, ProsPr and GraSP leave a self-distillation method aside, by design, but not the loss that is trained."""

    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        rows = nn.functional.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-rows).exp()) ** 2 * rows).mean()

    data = ToyBatches(shape=(1, 4, 3))
    for name in ("snip", "prospr", "grasp", "epsd"):
        score = SCORES[name](**({"samples_per_class": 2} if name == "grasp" else {}))
        common = {"score": score, "sparsity": 0.7}
        plain = prune(mlp(dtype=torch.float32), data, **common)
        assert prune(mlp(dtype=torch.float32), data, objective=focal, **common) != plain
        if name != "epsd":
            assert prune(mlp(dtype=torch.float32), data, objective=OBJECTIVES["pskd"](), **common) == plain


def weighted(gamma: float, weights: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        rows = nn.functional.cross_entropy(logits, labels, weights, reduction="none")
        return ((1 - (-rows).exp()) ** gamma * rows).mean()

    return loss


class Tempered(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits / self.temperature, labels)


def test_a_checkpoint_knows_the_loss_of_ones_own(tmp_path: Path) -> None:
    """By its code, what it closes over, its defaults and its attributes; the same loss made anew goes on."""
    label_smoothing = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    losses: list[Callable[[], Callable[[Tensor, Tensor], Tensor]]] = [
        lambda: cross_entropy,
        lambda: nn.functional.cross_entropy,
        lambda: label_smoothing,
        lambda: partial(nn.functional.cross_entropy, label_smoothing=0.2),
        lambda: weighted(1.0),
        lambda: weighted(2.0),
        lambda: weighted(2.0, torch.tensor([1.0, 2.0, 1.0])),
        lambda: weighted(2.0, torch.tensor([1.0, 2.0, 2.0])),
        lambda: lambda logits, labels: nn.functional.cross_entropy(logits, labels) * 2,
        lambda: lambda logits, labels: nn.functional.cross_entropy(logits, labels) * 3,
        lambda: Tempered(2.0),
        lambda: Tempered(3.0),
        lambda: Tempered(3.0).forward,
        lambda: nn.CrossEntropyLoss(),
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0])),
    ]
    once = Recipe(epochs=1, precision="fp32")
    for number, loss in enumerate(losses):
        checkpoint = tmp_path / f"{number}.safetensors"
        fit(convnet(), ToyBatches(), recipe=once, objective=loss(), checkpoint=checkpoint)
        fit(convnet(), ToyBatches(), recipe=once, objective=loss(), checkpoint=checkpoint)
        with pytest.raises(CheckpointError, match="other parameters"):
            other = losses[(number + 1) % len(losses)]()
            fit(convnet(), ToyBatches(), recipe=once, objective=other, checkpoint=checkpoint)
    marks = [json.dumps(described(as_objective(loss()))) for loss in losses]
    assert len(set(marks)) == len(marks)
