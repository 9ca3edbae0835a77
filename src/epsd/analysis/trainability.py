"""Trainability of a pruned network before its first step: how large a gradient reaches the weights that are left."""

import copy
import itertools

import torch
from torch import nn

from epsd.compute.devices import to_device
from epsd.losses import PlainLoss, cross_entropy
from epsd.masks import Mask
from epsd.pruning.scoring import calling, scoring
from epsd.pruning.unroll import gradient_of
from epsd.types import Batches, Objective

BATCHES = 8
"""Batches that the norm is averaged over."""


def gradient_norms(model: nn.Module, mask: Mask, batches: Batches, objective: Objective) -> dict[str, float]:
    """`grad_norm` under the run's own objective and `grad_norm_ce` under cross entropy, on the same images.

    Each is the mean over the first BATCHES batches of epoch 0 (after one that is drawn but not counted, so that DLB has
    a last batch to distil) of the norm of ∂L/∂w over all trainable parameters of the masked initial network, removed
    weights left out. The network is in training mode (an untrained one has no running statistics) and is left as it is
    in every respect. The objective stands as in scoring: PS-KD's distillation is live (see `epsd.objectives.pskd`),
    where its literal first epoch would equal cross entropy.
    """
    plain = PlainLoss(cross_entropy, objective.needs)
    return {"grad_norm": _norm(model, mask, batches, objective), "grad_norm_ce": _norm(model, mask, batches, plain)}


def _norm(model: nn.Module, mask: Mask, batches: Batches, objective: Objective) -> float:
    objective = copy.deepcopy(objective)
    objective.begin("score", batches.size, batches.num_classes)
    device = next(model.parameters()).device
    keep = {name: kept.to(device) for name, kept in mask.keep.items()}
    weights = {
        name: (p.detach() * keep[name] if name in keep else p.detach()).requires_grad_()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    norms = []
    with scoring(model):
        for batch in itertools.islice(batches.epoch(0, objective.needs), BATCHES + 1):
            loss = objective.loss(calling(model, weights), to_device(batch, device), 1.0)
            gradients = zip(weights, gradient_of(loss.total, weights, False), strict=True)
            left = [gradient * keep[name] if name in keep else gradient for name, gradient in gradients]
            norms.append(torch.nn.utils.get_total_norm(left))
    counted = norms[1:] or norms
    return float(torch.stack(counted).mean())
