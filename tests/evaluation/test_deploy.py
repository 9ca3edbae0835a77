"""Networks as ONNX files: they say what torch says, in fp32 and nearly so in int8, and tell nothing of this machine."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from epsd.architectures import ARCHITECTURES
from epsd.compute import quantise
from epsd.evaluation import deploy
from epsd.evaluation.intake import Intake, ServingError
from epsd.evaluation.servable import Servable, asking
from epsd.files import onnx_file
from epsd.files.digests import DamagedFile
from epsd.files.onnx_file import CARD, FOLDER, FP32, INT8, OnnxFile, sealed, words_of
from epsd.masks import matrices, prunable
from epsd.registry import choose
from epsd.types import EpsdError
from handed_on import INTAKE, onnx_folder, servable
from toys import convnet

COLOUR = Intake(["a", "b", "c"], (3, 16, 16), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], size=16, resize=20)
OPEN = ("batch", "height", "width")


def pixels(batch: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> Servable:
    """A ResNet with shortcuts and statistics of its own."""
    torch.manual_seed(0)
    net = choose(ARCHITECTURES, {"name": "resnet", "depth": 8}, "architecture")(3, (3, 16, 16))
    for _ in range(3):
        net(torch.randn(32, 3, 16, 16))
    return Servable(net, COLOUR)


@pytest.fixture(scope="module")
def folder(network: Servable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files of it."""
    made = tmp_path_factory.mktemp("onnx")
    deploy.export(network, torch.zeros(2, 3, 19, 17), OPEN, made / FP32, {CARD: json.dumps(vars(COLOUR))})
    deploy.quantise(made / FP32, made / INT8, pixels(64, 3, 16, 16))
    return made


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_it_says_what_torch_says(folder: Path, network: Servable, batch: int) -> None:
    for images in (pixels(batch, 3, 16, 16), pixels(batch, 3, 16, 16) / 255):
        assert np.abs(OnnxFile(folder / FP32)(images) - asking(network)(images)).max() < 1e-4


@pytest.mark.parametrize("shape", [(40, 33), (20, 20), (9, 30)])
def test_images_of_other_sizes_are_resized_alike(folder: Path, network: Servable, shape: tuple[int, int]) -> None:
    """But for a level of a pixel here and there."""
    images = pixels(3, 3, *shape)
    assert np.abs(OnnxFile(folder / FP32)(images) - asking(network)(images)).max() < 0.01


def test_int8_is_smaller_and_nearly_the_same(folder: Path) -> None:
    images = pixels(200, 3, 16, 16)
    exact, rough = OnnxFile(folder / FP32)(images), OnnxFile(folder / INT8)(images)
    assert (folder / INT8).stat().st_size < (folder / FP32).stat().st_size / 2
    assert np.abs(exact - rough).max() < 0.1 and np.abs(rough.sum(1) - 1).max() < 1e-5
    assert not np.array_equal(exact, rough)


def test_every_layer_is_in_int8_per_channel_and_the_preprocessing_in_none(folder: Path) -> None:
    model = onnx.load(folder / INT8)
    made = {name: node for node in model.graph.node for name in node.output}
    heavy = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(heavy) == 10
    for node in heavy:
        assert [made[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        weights = made[node.input[1]]
        scales = next(t for t in model.graph.initializer if t.name == weights.input[1])
        assert scales.dims[0] > 1, "one scale per output channel"
    before = [node.op_type for node in itertools.takewhile(lambda node: node != heavy[0], model.graph.node)]
    assert "Resize" in before
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert made[softmax.input[0]].op_type == "Gemm"


def codes(path: Path) -> dict[str, np.ndarray]:
    """Whole numbers of each layer's weights in a file, by the layer's name."""
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    ends = ("_quantized", "_packed")
    return {
        name.split("_quantized")[0].removeprefix("network."): values.astype(int)
        for name, values in found.items()
        if name.endswith(ends) and ".weight_quantized" in name
    }


@pytest.fixture(scope="module")
def rounded_files(network: Servable, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Servable, Path]]:
    """Bits -> the network with a quarter of its weights and rounded to so many, and the folder with its files."""
    made = {}
    for bits in (8, 4):
        own, folder = copy.deepcopy(network), tmp_path_factory.mktemp(f"bits{bits}")
        for weight in prunable(own.network).values():
            weight.data[torch.rand_like(weight) < 0.75] = 0
        own.network.layer1[0].bn1.weight.data[::2] *= -1  # factors of either sign
        quantise.round_(own.network, bits)
        deploy.export(own, torch.zeros(2, 3, 19, 17), OPEN, folder / FP32, {CARD: json.dumps(vars(COLOUR))})
        deploy.quantise(folder / FP32, folder / INT8, pixels(64, 3, 16, 16), bits)
        made[bits] = own, folder
    return made


@pytest.mark.parametrize("bits", [8, 4])
def test_the_weights_of_a_rounded_network_are_those_of_its_file(
    bits: int, rounded_files: dict[int, tuple[Servable, Path]]
) -> None:
    """Whole numbers, layer by layer; a BatchNorm behind a layer turns the sign of a channel at most."""
    own, folder = rounded_files[bits]
    if bits == 8 and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor needs weights of seven bits")
    found, layers = codes(folder / INT8), matrices(own.network)
    assert found.keys() == layers.keys()
    for name, weight in layers.items():
        channels = weight.detach().flatten(1)
        distance = channels.abs().amax(1, keepdim=True) / quantise.LEVELS[bits]
        expected = (channels / distance.clamp(min=1e-30)).round().int().numpy()
        written = found[name].reshape(expected.shape)
        signs = np.where((expected * written).sum(1) < 0, -1, 1)[:, None]
        assert np.array_equal(written * signs, expected), name
        assert np.abs(written).max() == quantise.LEVELS[bits] and (written == 0).mean() >= 0.7


@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_of_a_rounded_network_says_what_torch_says(
    bits: int, rounded_files: dict[int, tuple[Servable, Path]]
) -> None:
    own, folder = rounded_files[bits]
    images = pixels(200, 3, 16, 16)
    assert np.abs(OnnxFile(folder / INT8)(images) - asking(own)(images)).max() < 0.05


def test_four_bits_are_half_a_byte_and_the_file_says_so(
    folder: Path, network: Servable, rounded_files: dict[int, tuple[Servable, Path]]
) -> None:
    eight, four = (rounded_files[bits][1] / INT8 for bits in (8, 4))
    weights = sum(weight.numel() for weight in matrices(network.network).values())
    assert weights * 0.4 < eight.stat().st_size - four.stat().st_size < weights * 0.5
    assert "weight_bits" not in words_of(onnx.load(eight)) and words_of(onnx.load(four))["weight_bits"] == "4"
    deploy.quantise(folder / FP32, folder / "rough.onnx", pixels(64, 3, 16, 16), 4)
    images = pixels(200, 3, 16, 16)
    exact, eight_bits, four_bits = (OnnxFile(folder / name)(images) for name in (FP32, INT8, "rough.onnx"))
    assert np.abs(exact - four_bits).mean() > 3 * np.abs(exact - eight_bits).mean()


@pytest.mark.parametrize("channels", [1, 3])
def test_four_bits_of_products_of_matrices(channels: int, tmp_path: Path) -> None:
    """Linear layers become Gemm; where there are rows in between, MatMul, whose output channels come second."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(channels // 2 + 1), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3), nn.Flatten(1))
    quantise.round_(net, 4)
    intake = Intake(list("abcdefghi")[: 3 * channels], (channels, 4, 4), [0.5] * channels, [0.2] * channels)
    own, images = Servable(net, intake), pixels(64, channels, 4, 4)
    deploy.export(own, torch.zeros(2, channels, 4, 4), ("batch",), tmp_path / FP32, {CARD: "{}"})
    assert ("MatMul" if channels == 3 else "Gemm") in {node.op_type for node in onnx.load(tmp_path / FP32).graph.node}
    deploy.quantise(tmp_path / FP32, tmp_path / INT8, images, 4)
    kinds = [tensor.data_type for tensor in onnx.load(tmp_path / INT8).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT4) == 2
    assert np.abs(OnnxFile(tmp_path / INT8)(images) - asking(own)(images)).max() < 0.05


def test_the_twin_has_no_zeros_and_the_same_shape(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / FP32)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.where(np.abs(values) < 0.1, 0, values), tensor.name))
    onnx_file.save(model, tmp_path / "sparse.onnx", {CARD: "{}"})
    onnx_file.fill(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")
    dense = onnx.load(tmp_path / "dense.onnx")
    kernels = [onnx.numpy_helper.to_array(tensor) for tensor in dense.graph.initializer if len(tensor.dims) == 4]
    assert kernels and all(kernel.all() for kernel in kernels)
    assert [node.op_type for node in dense.graph.node] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("name", [FP32, INT8])
def test_nothing_of_this_machine_is_in_a_file(folder: Path, name: str, root: Path) -> None:
    content = (folder / name).read_bytes()
    for words in (str(root), str(Path.home()), sys.prefix, str(Path(torch.__file__).parent), "site-packages", ".py"):
        assert words.encode() not in content, words
    model = onnx.load(folder / name)
    assert [entry.key for entry in model.metadata_props] == [CARD, "digest"]
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert {entry.domain for entry in model.opset_import} == {node.domain for node in model.graph.node}
    assert (model.producer_name, model.producer_version) == ("epsd", "")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files of `servable()`."""
    return both(tmp_path_factory.mktemp("small"))


def both(parent: Path) -> Path:
    """Made in `parent`."""
    made = onnx_folder(parent)
    deploy.quantise(made / FP32, made / INT8, pixels(16, 1, 4, 4))
    return made


def test_the_same_network_gives_the_same_bytes_in_another_process(small: Path, tmp_path: Path) -> None:
    """Sets are walked in another order there."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import pathlib, test_deploy; "
    code += "test_deploy.both(pathlib.Path(sys.argv[3]))"
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent), str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    for name in (FP32, INT8):
        assert (small / name).read_bytes() == (tmp_path / FOLDER / name).read_bytes()


def test_a_file_knows_its_card(small: Path) -> None:
    found = OnnxFile(small / FP32)
    assert Intake.of(found.card) == INTAKE and found.weights == ""
    images = pixels(2, 1, 4, 4)
    assert found(images) == pytest.approx(asking(servable())(images), abs=1e-6)


@pytest.mark.parametrize("content", [b"", b"no network", sealed(b""), sealed(b"no network")])
def test_what_is_no_such_file_is_said_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(
        EpsdError, match=r"^\S*x\.onnx: (cannot be read as a|carries no digest: damaged, or no) network"
    ):
        OnnxFile(tmp_path / "x.onnx")


@pytest.mark.parametrize("place", [10, -400, -3])
def test_a_flipped_byte_is_told_and_not_used(place: int, folder: Path, tmp_path: Path) -> None:
    content = bytearray((folder / FP32).read_bytes())
    content[place] ^= 1
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"x\.onnx: (damaged|carries no digest)"):
        OnnxFile(tmp_path / "x.onnx")


def test_a_network_of_ones_own_answers_with_its_preprocessing(tmp_path: Path) -> None:
    model, path = convnet().eval(), tmp_path / "own.onnx"
    about: dict[str, Any] = {"class_names": ["a", "b", "c"], "image_shape": (1, 4, 4)}
    deploy.export_onnx(model, path, **about, mean=[0.3], std=[0.2])
    images = torch.randint(0, 256, (3, 1, 4, 4)).float()
    with torch.no_grad():
        expected = model((images / 255 - 0.3) / 0.2).softmax(1)
    file = OnnxFile(path)
    assert file(images.numpy()) == pytest.approx(expected.numpy(), abs=1e-5)
    assert file.card["class_names"] == about["class_names"]


def test_a_network_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not\nme")

    with pytest.raises(ServingError, match=r"torch cannot export this network \(\w+: ") as told:
        deploy.export_onnx(Odd(), tmp_path / "odd.onnx", class_names=["a", "b"], image_shape=(1, 4, 4))
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())
