"""Distillation from a teacher: the formula, the frozen teacher, its passes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from epsd.compute.cost import Meter
from epsd.project.recipes import Recipe
from epsd.studies.prune_then_distill.distillation import Distillation
from epsd.training.fit import fit
from toys import ToyBatches, convnet


def test_the_formula_and_its_gradient() -> None:
    """alpha·T²·KL + (1 − alpha)·CE by hand, the KL from probabilities."""
    batch, temperature, alpha = next(ToyBatches(dtype=torch.float64).epoch(0)), 10.0, 0.95
    teacher, student = convnet(dtype=torch.float64), convnet(dtype=torch.float64)
    torch.nn.init.normal_(teacher[8].weight)
    with torch.no_grad():
        told = (copy.deepcopy(teacher).eval()(batch.images) / temperature).softmax(1)
    logits = student(batch.images)
    said = (logits / temperature).softmax(1)
    divergence = (told * (told.log() - said.log())).sum(1).mean()
    expected = alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(logits, batch.labels)
    loss = Distillation(teacher).loss(student, batch, 1.0)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert float(loss.terms["distillation"]) == pytest.approx(100 * divergence.item(), rel=1e-12)
    assert torch.equal(loss.logits, logits)
    weight = student[8].weight
    (mine,), (by_hand,) = (torch.autograd.grad(each, weight, retain_graph=True) for each in (loss.total, expected))
    assert torch.allclose(mine, by_hand, rtol=1e-10, atol=1e-14)


def test_alpha_0_is_cross_entropy_and_a_twin_teaches_nothing_new() -> None:
    batch = next(ToyBatches().epoch(0))
    student = convnet().eval()
    plain = F.cross_entropy(student(batch.images), batch.labels).item()
    assert Distillation(convnet(), alpha=0).loss(student, batch, 1.0).total.item() == pytest.approx(plain)
    twin = Distillation(copy.deepcopy(student), alpha=1).loss(student, batch, 1.0)
    assert twin.total.item() == pytest.approx(0, abs=1e-4)


def test_training_leaves_the_teacher_alone_and_counts_its_passes() -> None:
    teacher, meter = convnet(), Meter()
    before = copy.deepcopy(teacher.state_dict())
    history = fit(
        convnet(),
        ToyBatches(),
        objective=Distillation(teacher, meter=meter),
        recipe=Recipe(epochs=2, lr=0.05),
        meter=meter,
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert history[-1]["cost/images_forward"] == 2 * 2 * 48, "student and teacher"
    assert history[-1]["cost/images_backward"] == 2 * 48, "the student alone"
    assert history[-1]["train/distillation"] > 0


def test_the_teacher_teaches_in_lower_precision_where_asked() -> None:
    batch = next(ToyBatches().epoch(0))
    teacher, student = convnet(), convnet()
    torch.nn.init.normal_(teacher[8].weight)
    exact = Distillation(teacher).loss(student, batch, 1.0)
    lower = Distillation(teacher, precision=torch.bfloat16).loss(student, batch, 1.0)
    assert lower.total.item() != exact.total.item()
    assert lower.total.item() == pytest.approx(exact.total.item(), rel=0.05)
