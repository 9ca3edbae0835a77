"""Which weights of a network are trained, and how: frozen ones, the head's learning rate, what does not decay."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from epsd.compute import networks
from epsd.masks import named
from epsd.training.record import TrainingError


def parameter_groups(model: nn.Module, head_lr: float = 1.0, decay_norms: bool = True) -> list[dict[str, Any]]:
    """Trainable parameters by what differs for them, those of the body first; `factor` is on the learning rate.

    Without `decay_norms` no weight decay falls on vectors: those of norms, and biases.
    """
    head = None if head_lr == 1 else networks.head(model)
    found: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = head is not None and name.startswith(f"{head}."), parameter.ndim < 2 and not decay_norms
            found.setdefault(kind, []).append(parameter)
    return [
        {"params": found[kind], "factor": head_lr if kind[0] else 1.0, **({"weight_decay": 0.0} if kind[1] else {})}
        for kind in sorted(found)
    ]


class Freeze:
    """Parameters that stay as they are, for all of a training or its first `epochs`.

    patterns : as of `masks.covered`: a parameter, a module with all in it, `*`, `?`, `[...]`. Raises MaskError for one
        that fits nothing.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], epochs: int | None) -> None:
        parameters = dict(model.named_parameters())
        names = {name for pattern in patterns for name in named(parameters, pattern, "train.freeze", "parameter")}
        self._model, self._epochs = model, epochs
        self._frozen = [parameters[name] for name in sorted(names) if parameters[name].requires_grad]
        self.modules: list[nn.Module] = []
        """Those in which all is frozen, with what is in them: in eval mode, where a BatchNorm keeps its statistics."""

    def begin(self) -> None:
        """TrainingError where nothing is left to train."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise TrainingError("train.freeze: names every trainable parameter: there is nothing to learn.")
        mine = {id(parameter) for parameter in self._frozen}
        whole = [module for module in self._model.modules() if _whole(module, mine)]
        self.modules = list(dict.fromkeys(inner for module in whole for inner in module.modules()))

    def thawed(self, epoch: int) -> list[nn.Parameter]:
        """Frozen weights that are trained from `epoch` (from 0) on: now they are trainable again."""
        return self.end() if self._epochs is not None and epoch >= self._epochs else []

    def end(self) -> list[nn.Parameter]:
        """All is trainable that was; what was frozen until now."""
        thawed, self._frozen, self.modules = self._frozen, [], []
        for parameter in thawed:
            parameter.requires_grad_(True)
        return thawed


def _whole(module: nn.Module, frozen: set[int]) -> bool:
    """Whether nothing in `module` is trainable, and some of it was until now."""
    own = list(module.parameters())
    return any(id(parameter) in frozen for parameter in own) and not any(parameter.requires_grad for parameter in own)
