"""Features in front of the classifier: how well they keep the classes apart, and a picture of them in the plane."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from epsd.compute.networks import hooked, in_mode
from epsd.types import Batches

MOST = 2000
"""Images in the picture, at most: t-SNE takes minutes beyond."""
TOO_FEW = 20
"""Images below which there is no neighbourhood to speak of: principal components instead of t-SNE."""


class Features(NamedTuple):
    """`values` (N, F) float32 on the CPU; `labels` (N,); `right` (N,) bool: classified correctly."""

    values: Tensor
    labels: Tensor
    right: Tensor


class Projection(NamedTuple):
    """`points` (N, 2); `labels`, `right` as of `Features`; `method`: "t-SNE" or "PCA"."""

    points: NDArray[np.float64]
    labels: Tensor
    right: Tensor
    method: str


def penultimate(model: nn.Module, batches: Batches) -> Features:
    """What goes into the last layer with weights (Linear or convolution), of the first MOST images, in evaluation mode.

    Averaged over space where that is a map (B, C, H, W), over tokens where it is (B, T, C).
    """
    device = next(model.parameters()).device
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = [inputs[0]]

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)]
    values, labels, right, drawn = [], [], [], 0
    with torch.no_grad(), in_mode(model), hooked((layer, note) for layer in layers):
        for batch in batches.epoch(0):
            logits = model(batch.images.to(device)).cpu()
            values.append(_flat(seen[0]).float().cpu())
            labels.append(batch.labels.cpu())
            right.append(logits.argmax(1) == labels[-1])
            drawn += len(logits)
            if drawn >= MOST:
                break
    return Features(*(torch.cat(part)[:MOST] for part in (values, labels, right)))


def _flat(features: Tensor) -> Tensor:
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.dim() == 3 else features


def separation(features: Features) -> float:
    """Mean distance between the centres of two classes / mean distance of an image to its class's centre.

    Large = classes are tight and apart. NaN with fewer than two classes.
    """
    classes = torch.tensor(sorted(set(features.labels.tolist())))
    if len(classes) < 2:
        return float("nan")
    values = features.values.double()
    centres = torch.stack([values[features.labels == label].mean(0) for label in classes])
    own = centres[torch.searchsorted(classes, features.labels)]
    within = (values - own).norm(dim=1).mean()
    return float(torch.pdist(centres).mean() / within.clamp(min=1e-12))


def project(features: Features, seed: int = 0) -> Projection:
    """The features in the plane: t-SNE (perplexity 30, or a third of the images) from the principal components on.

    PCA alone where there are fewer than TOO_FEW images one feature, or features that do not differ.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = features.values.double().numpy()
    linear = len(values) < TOO_FEW or values.shape[1] < 2 or float(values.std(axis=0).max()) < 1e-12
    if linear:
        flat = PCA(n_components=min(2, *values.shape), random_state=seed).fit_transform(values)
        points = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    else:
        points = TSNE(perplexity=min(30, len(values) / 3), init="pca", random_state=seed, n_jobs=1).fit_transform(
            values
        )
    return Projection(points.astype(np.float64), features.labels, features.right, "PCA" if linear else "t-SNE")
