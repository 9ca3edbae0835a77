"""Contract of every objective, and the identities that it must satisfy."""

import copy

import pytest
import torch
import torch.nn.functional as F

from epsd.losses import as_objective, cross_entropy, kl_divergence
from epsd.objectives import OBJECTIVES
from epsd.registry import ParamsError, choose
from epsd.types import Batch, Objective
from toys import ToyBatches, convnet, mlp

NAMES = sorted(OBJECTIVES)


def batches_for(objective: Objective, count: int = 4, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return list(ToyBatches(dtype=dtype, shape=(1, 4, 3)).epoch(0, objective.needs))[:count]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("purpose", ["score", "train"])
def test_contract(name: str, purpose: str) -> None:
    """Scalar, finite, differentiable twice; terms detached; logits of the images; parts sum up to the total."""
    objective = choose(OBJECTIVES, {"name": name})
    objective.begin(purpose, 48, 3)
    model = mlp()
    for batch in batches_for(objective):
        loss = objective.loss(model, batch, 0.5)
        assert loss.total.shape == ()
        assert torch.isfinite(loss.total)
        assert loss.logits.shape == (12, 3)
        assert not loss.logits.requires_grad
        assert all(not term.requires_grad and term.shape == () for term in loss.terms.values())
        assert sum(loss.parts.values()).item() == pytest.approx(loss.total.item())
        first = torch.autograd.grad(loss.total, model[1].weight, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), model[1].weight)[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_a_snapshot_while_scoring(name: str) -> None:
    objective = OBJECTIVES[name]()
    objective.begin("score", 48, 3)
    model, (first, second, third, _) = mlp(), batches_for(objective)
    objective.loss(model, first, 1.0)
    snapshot = copy.copy(objective)
    one = objective.loss(model, second, 1.0).total
    objective.loss(model, third, 1.0)
    assert torch.equal(copy.copy(snapshot).loss(model, second, 1.0).total, one)
    assert torch.equal(snapshot.loss(model, second, 1.0).total, one)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_a_checkpoint(name: str) -> None:
    objective = OBJECTIVES[name]()
    objective.begin("train", 48, 3)
    model = mlp()
    drawn = batches_for(objective)
    for batch in drawn:
        objective.loss(model, batch, 0.5)
    restored = OBJECTIVES[name]()
    restored.begin("train", 48, 3)
    restored.load_state_dict(copy.deepcopy(objective.state_dict()))
    for batch in drawn:
        assert torch.equal(objective.loss(model, batch, 0.75).total, restored.loss(model, batch, 0.75).total)


@pytest.mark.parametrize("name", NAMES)
def test_begin_forgets(name: str) -> None:
    objective = OBJECTIVES[name]()
    model, (first, second, *_) = mlp(), batches_for(objective)
    objective.begin("train", 48, 3)
    fresh = objective.loss(model, second, 0.5).total
    objective.begin("train", 48, 3)
    objective.loss(model, first, 0.5)
    objective.begin("train", 48, 3)
    assert torch.equal(objective.loss(model, second, 0.5).total, fresh)


def test_cskd_with_the_image_itself_as_partner_distils_nothing() -> None:
    """Identity 4."""
    objective = OBJECTIVES["cskd"]()
    model, (batch, *_) = convnet(dtype=torch.float64), list(ToyBatches(dtype=torch.float64).epoch(0))
    loss = objective.loss(model, batch._replace(partner=batch.images), 1.0)
    assert loss.terms["distillation"].abs() < 1e-12
    assert loss.total.item() == pytest.approx(loss.terms["cross_entropy"].item())


def test_cskd_updates_running_statistics_once_per_half() -> None:
    objective = OBJECTIVES["cskd"]()
    model = convnet(dtype=torch.float64).train()
    reference = copy.deepcopy(model)
    batch = next(ToyBatches(dtype=torch.float64).epoch(0, objective.needs))
    objective.loss(model, batch, 1.0)
    reference(batch.images)
    reference(batch.partner)
    assert torch.equal(model[1].running_mean, reference[1].running_mean)


def test_dlb_distils_from_the_last_batch_only() -> None:
    objective = OBJECTIVES["dlb"](temperature=2.0, weight=0.7)
    objective.begin("train", 48, 3)
    model, (first, second, *_) = mlp(), batches_for(objective)
    assert objective.loss(model, first, 0.1).terms["distillation"] == 0
    before = model(first.images).detach()
    with torch.no_grad():
        model[1].weight.add_(0.1)
    loss = objective.loss(model, second, 0.1)
    again = model(first.partner)
    p, log_q = F.softmax(before / 2, 1), F.log_softmax(again / 2, 1)
    by_hand = 4 * (p * (p.log() - log_q)).sum(1).mean()
    assert loss.terms["distillation"].item() == pytest.approx(by_hand.item())
    both = torch.cat([again, model(second.images)]), torch.cat([first.labels, second.labels])
    assert loss.total.item() == pytest.approx((F.cross_entropy(*both) + 0.7 * by_hand).item())


def test_pskd_first_epoch_is_cross_entropy_then_remembers_the_last_forward() -> None:
    objective = OBJECTIVES["pskd"](alpha=0.8)
    objective.begin("train", 48, 3)
    model, (batch, *_) = mlp(), batches_for(objective)
    plain = F.cross_entropy(model(batch.images), batch.labels)
    assert objective.loss(model, batch, 0.25).total.item() == pytest.approx(plain.item())
    past = F.softmax(model(batch.images), 1).detach()
    with torch.no_grad():
        model[1].weight.add_(0.1)
    loss = objective.loss(model, batch, 0.5)
    target = (1 - 0.4) * F.one_hot(batch.labels, 3) + 0.4 * past
    by_hand = -(target * F.log_softmax(model(batch.images), 1)).sum(1).mean()
    assert loss.total.item() == pytest.approx(by_hand.item())


def test_pskd_memory_is_halved_where_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from epsd.objectives import pskd

    monkeypatch.setattr(pskd, "_HALF_ABOVE", 100)
    monkeypatch.setattr(pskd, "_MAPPED_ABOVE", 200)
    objective = OBJECTIVES["pskd"]()
    objective.begin("train", 48, 3)
    model, (batch, *_) = mlp(dtype=torch.float32), batches_for(OBJECTIVES["pskd"](), dtype=torch.float32)
    objective.loss(model, batch, 0.5)
    assert objective.past.dtype == torch.float16
    assert objective.past.shape == (48, 3)
    stored = objective.past[batch.indices].float()
    assert torch.allclose(stored, F.softmax(model(batch.images), 1).detach(), atol=1e-3)
    assert objective.seen.sum() == 12


def test_pskd_scores_live_by_default_and_literally_by_option() -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        other[1].weight.mul_(0.5)
    drawn = batches_for(OBJECTIVES["pskd"]())
    literal, live = OBJECTIVES["pskd"](score="literal"), OBJECTIVES["pskd"](alpha=0.8)
    for objective in (literal, live):
        objective.begin("score", 48, 3)
        objective.loss(model, drawn[0], 1.0)
    plain = F.cross_entropy(other(drawn[1].images), drawn[1].labels)
    assert literal.loss(other, drawn[1], 1.0).total.item() == pytest.approx(plain.item())
    past = F.softmax(model(drawn[1].images), 1).detach()
    target = 0.2 * F.one_hot(drawn[1].labels, 3) + 0.8 * past
    by_hand = -(target * F.log_softmax(other(drawn[1].images), 1)).sum(1).mean()
    assert live.loss(other, drawn[1], 1.0).total.item() == pytest.approx(by_hand.item())


def test_kl_is_zero_for_equal_logits_and_scaled_by_the_square_of_the_temperature() -> None:
    logits, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert kl_divergence(logits, logits, 3.0).abs() < 1e-15
    p = F.softmax(target / 3, 1)
    by_hand = 9 * (p * (p.log() - F.log_softmax(logits / 3, 1))).sum() / 5
    assert kl_divergence(target, logits, 3.0).item() == pytest.approx(by_hand.item())


def test_label_smoothing_reaches_the_supervised_term() -> None:
    model, (batch, *_) = mlp(), batches_for(OBJECTIVES["cross_entropy"]())
    smooth = OBJECTIVES["cross_entropy"](label_smoothing=0.1).loss(model, batch, 1.0).total
    expected = F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1)
    assert torch.equal(smooth, expected)


def test_a_plain_loss_is_an_objective() -> None:
    model, (batch, *_) = mlp(), batches_for(OBJECTIVES["cross_entropy"]())
    objective = as_objective(cross_entropy)
    assert torch.equal(objective.loss(model, batch, 1.0).total, cross_entropy(model(batch.images), batch.labels))
    assert as_objective(objective) is objective


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "cskdd"}, "Did you mean 'cskd'"),
        ({"name": "cskd", "tau": 4.0}, r"unknown 'tau'.*temperature, weight"),
        ({"name": "cskd", "temperature": 0.0}, "objective.temperature"),
        ({"name": "cskd", "weight": "much"}, "objective.weight"),
        ({"name": "pskd", "alpha": 1.5}, "objective.alpha"),
        ({"name": "pskd", "score": "lively"}, "literal"),
    ],
)
def test_bad_settings_name_the_key(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        choose(OBJECTIVES, choice, "objective")


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_weighted_and_smoothed_as_torch_does_it(name: str) -> None:
    """Epoch 0 of a network without distillation is torch's cross entropy, the sum divided by the images."""
    weights, model, none = [0.5, 1.0, 3.0], mlp(), {"weight": 0.0} if name in ("cskd", "dlb") else {}
    objective = OBJECTIVES[name](label_smoothing=0.1, class_weights=weights, **none)
    objective.begin("train", 48, 3)
    batch = batches_for(objective)[0]
    wanted = {"weight": torch.tensor(weights, dtype=torch.float64), "label_smoothing": 0.1}
    theirs = F.cross_entropy(model(batch.images), batch.labels, **wanted, reduction="sum") / len(batch.labels)
    found = objective.loss(model, batch, 0.0)
    assert found.total.item() == pytest.approx(theirs.item())
    assert sum(found.parts.values()).item() == pytest.approx(theirs.item())


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_are_none(name: str) -> None:
    plain, equal = OBJECTIVES[name](), OBJECTIVES[name](class_weights=[1.0, 1.0, 1.0])
    model = mlp()
    for objective in (plain, equal):
        objective.begin("train", 48, 3)
    for batch in batches_for(plain):
        one, other = (objective.loss(model, batch, 0.5).total.item() for objective in (plain, equal))
        assert one == pytest.approx(other)
