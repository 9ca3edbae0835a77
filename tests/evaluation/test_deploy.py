"""Networks as ONNX files: they say what torch says, in fp32 and nearly so in int8, and tell nothing of this machine."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from epsd.architectures import ARCHITECTURES
from epsd.evaluation import deploy
from epsd.evaluation.intake import Intake
from epsd.evaluation.servable import Servable, asking
from epsd.files import onnx_file
from epsd.files.digests import DamagedFile
from epsd.files.onnx_file import CARD, FOLDER, FP32, INT8, OnnxFile, sealed
from epsd.registry import choose
from epsd.types import EpsdError
from handed_on import INTAKE, onnx_folder, servable

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
