"""Objectives against the official CS-KD, PS-KD and DLB losses, gradients and miniature trainings."""

from typing import Any

import pytest
import torch
from torch import Tensor

from epsd.objectives import OBJECTIVES
from epsd.types import Batch
from oracles import problems
from oracles.problems import array, arrays, assert_close, cases, net

pytestmark = [pytest.mark.shared, pytest.mark.skipif(not problems.PRESENT, reason=problems.REASON)]
DOUBLE = torch.float64


def identity(case: dict[str, Any]) -> str:
    return str(case["id"])


class Table:
    """A forward that returns given logits in the order of its calls."""

    def __init__(self, *logits: Tensor) -> None:
        self.logits = list(logits)

    def __call__(self, images: Tensor) -> Tensor:
        return self.logits.pop(0)


def images(count: int) -> Tensor:
    return torch.zeros(count, 1, 1, 1, dtype=DOUBLE)


@pytest.mark.parametrize("case", cases("cskd_loss"), ids=identity)
def test_cskd_loss(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    anchor = array(case, "anchor_logits").requires_grad_()
    partner = array(case, "partner_logits").requires_grad_()
    objective = OBJECTIVES["cskd"](temperature=float(hyper["T"]), weight=float(hyper["lamda"]))
    labels = array(case, "y")
    batch = Batch(images(len(labels)), labels, torch.arange(len(labels)), images(len(labels)))
    loss = objective.loss(Table(anchor, partner), batch, 1.0)
    assert_close(loss.total.detach(), array(case, "total"))
    assert_close(loss.terms["cross_entropy"], array(case, "ce"))
    assert_close(loss.terms["distillation"], array(case, "kd"))
    if hyper["lamda"]:
        only = torch.autograd.grad(loss.parts["distillation"], anchor, retain_graph=True)[0] / hyper["lamda"]
        assert_close(only, array(case, "grad_anchor_kd_only"))
    loss.total.backward()
    assert_close(anchor.grad, array(case, "grad_anchor"))
    assert partner.grad is None, "no gradient may flow into the partner: it is a target"


@pytest.mark.parametrize("case", cases("pskd_loss"), ids=identity)
def test_pskd_loss(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    if "inputs" not in hyper:
        reference = arrays(case["file"])[case["id"] + "/" + case["arrays"][0]]
        epochs = len(reference)
        ours = [hyper["alpha_T"] * (epoch + 1) / epochs for epoch in range(epochs)]
        assert_close(torch.tensor(ours, dtype=DOUBLE), torch.from_numpy(reference))
        return
    start = hyper["inputs"]
    given = {name: torch.from_numpy(arrays(case["file"])[start + name]) for name in ("logits", "y", "indices")}
    past = torch.from_numpy(arrays(case["file"])[start + "past_predictions"]).clone()
    logits = given["logits"].requires_grad_()
    objective = OBJECTIVES["pskd"](alpha=float(hyper["alpha_T"]))
    objective.begin("train", len(past), logits.shape[1])
    objective.past, objective.seen = past, torch.full((len(past),), hyper["epoch"] > 0)
    batch = Batch(images(len(logits)), given["y"], given["indices"])
    loss = objective.loss(Table(logits), batch, (hyper["epoch"] + 1) / hyper["end_epoch"])
    assert_close(loss.total.detach(), array(case, "loss"))
    loss.total.backward()
    assert_close(logits.grad, array(case, "grad"))
    assert_close(objective.past[given["indices"]], array(case, "past_after")[given["indices"]])


@pytest.mark.parametrize("case", cases("dlb_loss"), ids=identity)
def test_dlb_loss(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    objective = OBJECTIVES["dlb"](temperature=float(hyper["T"]), weight=float(hyper["alpha"]))
    out = array(case, "out").requires_grad_()
    labels = array(case, "y")
    batch = Batch(images(len(labels)), labels, torch.arange(len(labels)), images(len(labels)))
    if hyper["first"]:
        loss = objective.loss(Table(out), batch, 1.0)
    else:
        before = array(case, "pre_out").requires_grad_()
        again = array(case, "out_pre").requires_grad_()
        labels_before = array(case, "pre_y")
        first = Batch(
            images(len(labels_before)), labels_before, torch.arange(len(labels_before)), images(len(labels_before))
        )
        objective.loss(Table(before), first, 1.0)
        loss = objective.loss(Table(out, again), batch, 1.0)
        assert_close(loss.terms["cross_entropy"], array(case, "ce"))
        assert_close(loss.terms["distillation"], array(case, "kl_scaled"))
    loss.total.backward()
    assert_close(loss.total.detach(), array(case, "total"))
    assert_close(out.grad, array(case, "grad_out"))
    if not hyper["first"]:
        assert_close(again.grad, array(case, "grad_out_pre"))
        assert before.grad is None


def steps(case: dict[str, Any]) -> list[tuple[float, Batch]]:
    """(progress, batch) of every step of a miniature training."""
    hyper, name = case["hyper"], case["net"]
    if case["kind"] == "cskd_run":
        return [(1.0, problems.batch(name, number, "same_class")) for number in hyper["batches"]]
    if case["kind"] == "dlb_run":
        whole = [problems.batch(name, number, "view") for number in range(3)]
        sizes = hyper["batch_sizes_of_batch"]
        cut = [Batch(*(field[:size] for field in batch)) for batch, size in zip(whole, sizes, strict=True)]
        return [(1.0, cut[number]) for epoch in hyper["order"] for number in epoch]
    x, y = problems.data(name, "x").flatten(0, 1), problems.data(name, "y").flatten()
    order, size = array(case, "order"), hyper["batch_size"]
    return [
        ((epoch + 1) / len(order), Batch(x[chunk], y[chunk], chunk))
        for epoch, row in enumerate(order)
        for chunk in torch.split(row.long(), size)
    ]


def objective_of(case: dict[str, Any]):  # type: ignore[no-untyped-def]
    hyper = case["hyper"]
    if case["kind"] == "pskd_run":
        objective = OBJECTIVES["pskd"](alpha=float(hyper["alpha_T"]))
        objective.begin("train", hyper["n_samples"], 5)
        return objective
    name, weight = ("cskd", "lamda") if case["kind"] == "cskd_run" else ("dlb", "alpha")
    return OBJECTIVES[name](temperature=float(hyper["T"]), weight=float(hyper[weight]))


@pytest.mark.parametrize("case", cases("dlb_run", "pskd_run", "cskd_run"), ids=identity)
def test_miniature_training(case: dict[str, Any]) -> None:
    """Step by step: the loss of every step, the stored predictions, and the weights at the end."""
    hyper = case["hyper"]
    model = net(case["net"]).train()
    objective = objective_of(case)
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=hyper["lr"],
        momentum=hyper["momentum"],
        nesterov=hyper["nesterov"],
        weight_decay=hyper["weight_decay"],
    )
    found: list[Tensor] = []
    terms: list[dict[str, Tensor]] = []
    stored = []
    for progress, batch in steps(case):
        loss = objective.loss(model, batch, progress)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        found.append(loss.total.detach())
        terms.append(loss.terms)
        stored.append(getattr(objective, "past", None) if case["kind"] == "pskd_run" else None)
        if stored[-1] is not None:
            stored[-1] = stored[-1].clone()
    totals = torch.stack(found)
    if case["kind"] == "cskd_run":
        assert_close(torch.stack([term["cross_entropy"] for term in terms]), array(case, "ce"))
        assert_close(torch.stack([term["distillation"] for term in terms]), array(case, "kd"))
    else:
        assert_close(totals, array(case, "loss").flatten())
    if case["kind"] == "dlb_run":
        assert_close(torch.stack([term["distillation"] for term in terms]), array(case, "kl_scaled"))
        assert_close(objective.last[0].logits, array(case, "pre_out_after_epoch1"))
    if case["kind"] == "pskd_run":
        per_epoch = len(found) // len(array(case, "order"))
        for epoch in range(len(array(case, "order"))):
            assert_close(stored[(epoch + 1) * per_epoch - 1], array(case, f"predictions_after_epoch{epoch}"))
    state = model.state_dict()
    for key in case["arrays"]:
        if key.startswith("final_state/"):
            assert_close(state[key.removeprefix("final_state/")].double(), array(case, key).double(), 1e-9)
