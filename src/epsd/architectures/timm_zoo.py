"""Any model of the timm library by its name there, with random weights. An optional extra: `pip install timm`."""

import difflib
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import nn

from epsd.architectures._features import ArchitectureError, pyramid, try_on, wake_
from epsd.registry import ParamsError, variant

INSTALL = "make sure the extra is installed: .venv/bin/pip install -e '.[timm]'"


def _timm() -> Any:
    """The library. Raises ArchitectureError, with the command to install it, where it is missing."""
    try:
        import timm
    except ImportError:
        raise ArchitectureError(f"architecture: 'timm_zoo' needs the timm library; {INSTALL}.") from None
    return timm


def _known(model: str) -> str:
    timm = _timm()
    names = timm.list_models()
    architecture = model.split(".")[0]
    if architecture not in names:
        near = ", ".join(difflib.get_close_matches(architecture, names, n=8, cutoff=0.5)) or "none"
        raise ParamsError(
            f"architecture.model: timm {timm.__version__} has no '{model}'. Close to it: {near}. "
            f'All {len(names)}: python -c "import timm; print(timm.list_models())".'
        )
    return model


_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}
"""Layers of timm (BiT, NF-Net) that convolve with (w − mean) / std of what they hold."""


@variant
class TimmZoo:
    """A classifier of timm, built with `pretrained=False`: its own initialisation, nothing is downloaded.
    Layers that it starts at zero (the classifier of vision transformers) are drawn instead, and norms that scale by
    zero (the last one in the blocks of a ResNet of timm) start at 1: no score could rank what they silence.

    Settings
    --------
    model : the name in timm's list, e.g. resnet26, efficientnet_lite0, vit_tiny_patch16_224.

    timm adapts the first convolution to the number of channels, and ViT-like networks are built for the
    images' size. One image is passed through at construction, so that an unfit size fails there, with the reason.
    """

    model: Annotated[str, AfterValidator(_known)]

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network with random weights from the global generator. Raises ArchitectureError where images do not fit."""
        channels, *size = image_shape
        options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels, "pretrained": False}
        try:
            try:
                net = _timm().create_model(self.model, img_size=tuple(size), **options)
            except TypeError:  # a network that takes any size has no such argument
                net = _timm().create_model(self.model, **options)
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            given = "x".join(map(str, image_shape))
            raise ArchitectureError(f"architecture: '{self.model}' cannot take images of {given} ({error}).") from None
        recomputed = [name for name, module in net.named_modules() if type(module).__name__ in _STANDARDISED]
        if recomputed:
            raise ArchitectureError(
                f"architecture: '{self.model}' standardises its convolution weights in every pass ({recomputed[0]}, "
                "...), so that removed weights would not stay zero in the kernels: it cannot be pruned. Choose another."
            )
        return try_on(wake_(net), image_shape, self.model, "most of timm's networks are made for 224x224")

    def feature_nodes(self, model: nn.Module) -> list[str]:
        """The last block at each resolution from stride 2 on. Raises ArchitectureError for ViT-like networks."""
        return pyramid(model, self.model)
