"""Any classifier of torchvision by its name there, with random weights: mobilenet_v3_small, convnext_tiny, vit_b_16."""

from typing import Annotated, Any

from pydantic import AfterValidator
from torch import nn

from epsd.architectures._features import ArchitectureError, adapt_channels, pyramid, try_on, wake_
from epsd.registry import unknown, variant


def classifiers() -> list[str]:
    """The names that torchvision knows (quantised networks excluded)."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _known(model: str) -> str:
    if model not in (names := classifiers()):
        raise unknown("architecture.model", model, names)
    return model


def _arguments(model: str, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What a family needs to be built for this image size, and to give logits only."""
    if model.startswith("vit_"):
        return {"image_size": image_shape[1]}
    if model.startswith("maxvit"):
        return {"input_size": image_shape[1:]}
    if model.startswith(("googlenet", "inception")):
        return {"aux_logits": False, "init_weights": True}
    return {}


@variant
class TorchvisionZoo:
    """A classifier of torchvision, built with `weights=None`; its own initialisation, as its authors wrote it there.
    Layers that it starts at zero (the classifier of vision transformers) are drawn instead, and norms that scale by
    zero start at 1: no score could rank what they silence.

    Settings
    --------
    model : the name in torchvision's list. An unknown one is refused with the whole list.

    The first convolution is replaced where images do not have three channels. Sizes: most networks pool globally and
    take 32 px or more; alexnet, squeezenet, densenet and inception need 64 to 75; vit_* takes square multiples of its
    patch, and is built for the images' size. One image is passed through at construction, so that an unfit size fails
    there, with the reason.
    """

    model: Annotated[str, AfterValidator(_known)]

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network with random weights from the global generator. Raises ArchitectureError where images do not fit."""
        import torchvision

        hint = "most of torchvision's networks are made for 224x224"
        try:
            arguments = _arguments(self.model, image_shape)
            net = torchvision.models.get_model(self.model, weights=None, num_classes=num_classes, **arguments)
        except (ValueError, RuntimeError, AssertionError) as error:
            size = "x".join(map(str, image_shape))
            raise ArchitectureError(f"architecture: '{self.model}' cannot take images of {size} ({error}).") from None
        adapt_channels(net, image_shape[0])
        return try_on(wake_(net), image_shape, self.model, hint)

    def feature_nodes(self, model: nn.Module) -> list[str]:
        """The last block at each resolution from stride 2 on. Raises ArchitectureError for ViT-like networks."""
        return pyramid(model, self.model)
