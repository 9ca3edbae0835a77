"""What one epoch of training leaves behind, summed on the device while it runs."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from epsd.compute import distributed
from epsd.losses import Metric, are_classes, class_logits
from epsd.project.runtime import counted
from epsd.types import EpsdError

Record = dict[str, float]
"""One epoch: `epoch` (from 1), `train/loss`, `train/<term>`, `train/grad_norm` (mean over steps of the norm of the
whole gradient, masked, before clipping), `train/top1` (where the network gives logits), `train/lr`, `time/epoch`,
`val/top1`, ...; what was spent up to its end (validation excluded): `cost/images_forward`, ..., `cost/image_passes`,
`cost/seconds`."""


class History(list[Record]):
    """The records of a training, one for each epoch."""

    def __repr__(self) -> str:
        """One line: how the figures went from the first epoch to the last, and what it took."""
        if not self:
            return "History of no epoch"
        first, last = self[0], self[-1]
        told = [
            f"{name} {first[name]:.4g} to {last[name]:.4g}"
            for name in last
            if name in first and (name in ("train/loss", "train/top1") or name.startswith("val/"))
        ]
        seconds = sum(record.get("time/epoch", 0.0) for record in self)
        return f"History of {counted(len(self), 'epoch')}: {', '.join(told)}; {seconds:.1f} s"


def judged_by(metrics: Mapping[str, Metric], answers: Iterable[tuple[Tensor, Tensor]]) -> Record:
    """The value of each metric on all outputs and labels (of all processes). TrainingError: there are none."""
    mine = [(given.float().cpu(), labels.cpu()) for given, labels in answers]
    pairs = [pair for part in distributed.interleaved([mine]) for pair in part]
    if not pairs:
        raise TrainingError("validation: there is no batch to judge the network on.")
    outputs, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return {name: float(metric(outputs, labels)) for name, metric in metrics.items()}


_CHECK_EVERY = 50
"""Steps between looks at the loss on a GPU: each look waits for the device."""


class TrainingError(EpsdError):
    """Training cannot go on: the loss is not finite, or there is nothing to train on."""


class Tally:
    """Sums of an epoch, kept on the device so that no step waits for it; watches that the loss stays finite."""

    def __init__(self, steps: int, device: torch.device, epoch: int) -> None:
        self._every = 1 if device.type == "cpu" else _CHECK_EVERY
        self._device, self._epoch = device, epoch
        self._losses: list[Tensor] = []
        self._checked = 0
        self._sums: dict[str, Tensor] = {}
        self._right = torch.zeros((), device=device)
        self._norms: list[Tensor] = []
        self._images = 0
        self._steps = steps

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return len(self._losses)

    def add(self, total: Tensor, terms: dict[str, Tensor], logits: Tensor | None, labels: Tensor) -> None:
        """One step: the batch's loss and terms (detached), its logits (B, K), where it has some, and labels."""
        self._losses.append(total)
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term
        if logits is not None and are_classes(labels):
            self._right += (class_logits(logits, labels).argmax(1) == labels).sum()
            self._images += len(labels)
        if len(self._losses) % self._every == 0:
            self._check()

    def add_gradient(self, norm: Tensor) -> None:
        """`norm`: of the step's gradient; infinite where scaled half precision overflowed and the step is skipped."""
        self._norms.append(norm)

    def _check(self) -> None:
        fresh = torch.stack(self._losses[self._checked :])
        distributed.mean_([fresh])
        bad = torch.nonzero(~torch.isfinite(fresh)).flatten()
        if len(bad):
            step = self._checked + int(bad[0]) + 1
            raise TrainingError(
                f"the loss is {float(fresh[bad[0]])} at epoch {self._epoch + 1}, step {step} of {self._steps}. "
                "The last good epoch is kept. A smaller train.lr, a warm-up or train.clip_norm usually helps."
            )
        self._checked = len(self._losses)

    def means(self) -> Record:
        """The epoch's figures of training. TrainingError: a loss that is NaN or infinite."""
        if self._checked < len(self._losses):
            self._check()
        count = max(1, len(self._losses))
        loss = torch.stack(self._losses).mean() if self._losses else torch.zeros(())
        distributed.mean_([loss, *self._sums.values()])
        images = torch.tensor(self._images, device=self._device)
        distributed.sum_([self._right, images])
        record = {"train/loss": float(loss)}
        record |= {f"train/{name}": float(total) / count for name, total in self._sums.items()}
        norms = torch.stack(self._norms)
        finite = norms[torch.isfinite(norms)]
        record["train/grad_norm"] = float((finite if len(finite) else norms).mean())
        return record | ({"train/top1": float(self._right) / int(images)} if images else {})
