"""The learning rate at each step of a recipe."""

import math

from epsd.project.recipes import Recipe


class Rewound(Recipe):
    """The last `epochs` epochs of the schedule of `whole`."""

    whole: Recipe


def lr_at(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step `step` (from 0)."""
    if isinstance(recipe, Rewound):
        return lr_at(recipe.whole, step + (recipe.whole.epochs - recipe.epochs) * steps_per_epoch, steps_per_epoch)
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "step":
        passed = sum(step // steps_per_epoch >= max(1, round(share * recipe.epochs)) for share in recipe.milestones)
        return recipe.lr * recipe.gamma**passed
    if recipe.schedule == "cosine":
        total = max(1, recipe.epochs * steps_per_epoch - warmup)
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
    return recipe.lr
