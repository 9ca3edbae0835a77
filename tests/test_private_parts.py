"""Where src leans on private parts of other libraries: each is touched by name here, so that an upgrade that takes one
away fails in this file and says which. `tests/test_house.py` finds private names in src that are not listed here.
"""

import importlib
import importlib.util
import inspect
import mmap
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

NAMES = (
    "torch._foreach_add",
    "torch._foreach_add_",
    "torch._foreach_div_",
    "torch._foreach_mul_",
    "torch.cpu._is_amx_tile_supported",  # what a processor computes bf16 in
    "torch.cpu._is_avx512_bf16_supported",
    "torch.cpu._is_vnni_supported",  # and whether it multiplies int8 without overflowing
    "torch.nn.modules.batchnorm._BatchNorm",  # families of layers
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.pooling._AdaptiveMaxPoolNd",
    "torch.nn.modules.pooling._MaxPoolNd",
    "torch.ops.aten._assert_async",  # a check of values that stays in a graph that is exported
    "torch.utils._pytree.tree_leaves",  # tuples and mappings of tensors, as networks of users' own give them
    "torch.utils._pytree.tree_map",
)
"""Private names of modules, in full."""


def module() -> Any:
    """A layer."""
    from torch import nn

    return nn.Linear(2, 2)


ATTRIBUTES: dict[str, Callable[[], Any]] = {
    "_forward_hooks": module,
    "_non_persistent_buffers_set": module,
    "_parameters": module,
}
"""Private attributes of objects -> one that has it."""


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_there(name: str) -> None:
    place, _, last = name.rpartition(".")
    assert hasattr(pkgutil.resolve_name(place), last), f"{name} is gone: find who uses it in src"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_is_there(name: str) -> None:
    made = ATTRIBUTES[name]()
    assert hasattr(made, name), f"{type(made).__name__} has no {name} any more: find who uses it in src"


# --- torch ----------------------------------------------------------------------------------------------------------


def test_lists_of_tensors_are_added_scaled_and_divided_in_place() -> None:
    import torch

    some, others = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]
    torch._foreach_add_(some, others, alpha=2.0)
    torch._foreach_mul_(some, 4.0)
    torch._foreach_div_(some, 6.0)
    assert [tensor.tolist() for tensor in torch._foreach_add(some, others, alpha=-1.0)] == [[1.0] * 2, [1.0] * 3]


def test_processors_answer_yes_or_no() -> None:
    import torch

    cpu = torch.cpu
    asked = cpu._is_amx_tile_supported, cpu._is_avx512_bf16_supported, cpu._is_vnni_supported
    assert {type(ask()) for ask in asked} == {bool}


def test_families_of_layers_hold_the_layers() -> None:
    from torch import nn
    from torch.nn.modules import batchnorm, conv, pooling

    families = {
        conv._ConvNd: (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d),
        batchnorm._BatchNorm: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        batchnorm._NormBase: (nn.BatchNorm2d, nn.InstanceNorm2d),
        pooling._MaxPoolNd: (nn.MaxPool2d,),
        pooling._AdaptiveMaxPoolNd: (nn.AdaptiveMaxPool2d,),
    }
    for family, layers in families.items():
        assert all(issubclass(layer, family) for layer in layers), family
    assert not issubclass(nn.Linear, conv._ConvNd)


def test_a_layer_keeps_its_parameters_buffers_and_hooks_where_they_are_looked_for() -> None:
    """What weight norm computes is no parameter; a copy without hooks calls none; buffers that are not saved."""
    import torch
    from torch import nn

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert module()._parameters["weight"] is not None and normed._parameters.get("weight") is None
    called: list[bool] = []
    layer = module()
    layer.register_forward_hook(lambda *_: called.append(True))
    layer._forward_hooks = type(layer._forward_hooks)()
    layer(torch.zeros(1, 2))
    assert not called
    layer.register_buffer("passing", torch.zeros(1), persistent=False)
    assert layer._non_persistent_buffers_set == {"passing"}


def test_attention_names_its_projections() -> None:
    from torch import nn

    from epsd import masks

    joint, apart = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    names = {name for net in (joint, apart) for name, _ in net.named_parameters() if name.endswith("proj_weight")}
    assert set(masks._ATTENTION) == names


def test_steps_of_the_optimiser_can_be_unwrapped() -> None:
    """Only a wrapped function has something below the wrapper; without one, `epsd.compute.speed._Sgd` has no use."""
    import torch

    for name in ("zero_grad", "state_dict", "load_state_dict", "add_param_group"):
        assert inspect.unwrap(getattr(torch.optim.SGD, name)).__name__ == name
    assert inspect.unwrap(torch.optim.SGD.step) is not torch.optim.SGD.step


def test_kernels_that_are_called_by_name() -> None:
    import torch

    taken = {
        "convolution": 9,
        "convolution_backward": 11,
        "native_batch_norm": 8,
        "native_batch_norm_backward": 10,
    }
    for name, arguments in taken.items():
        kernel = getattr(torch.ops.aten, name)
        assert len(kernel.default._schema.arguments) == arguments, name
    kept, mask = torch.native_dropout(torch.ones(4), 0.5, True)
    assert set(kept.tolist()) <= {0.0, 2.0} and mask.dtype == torch.bool


def test_the_compiler_is_where_its_loading_is_noticed() -> None:
    import torch

    assert importlib.util.find_spec("torch._dynamo") is not None
    assert "force_eager" in inspect.getsource(torch.compiler.set_stance)


def test_ddp_and_joint_batch_norm_take_what_they_are_given() -> None:
    from torch import nn

    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    assert {"forward_sync_buffers", "broadcast_buffers"} & set(known)
    assert hasattr(nn.SyncBatchNorm(2), "process_group")
    own = set(vars(nn.SyncBatchNorm(2))) - set(vars(nn.BatchNorm2d(2)))
    assert own == {"process_group"}, "a BatchNorm that becomes a SyncBatchNorm gets this one, and no other"


# --- what errors say ------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_says_so() -> None:
    import torch

    from epsd.compute import shortage
    from epsd.files import images

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert shortage.is_shortage(caught.value)
    assert any(words in str(caught.value) for words in images._SHORTAGES)
    assert os.strerror(12) in shortage._SHORTAGES
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


def test_a_label_without_an_output_is_named() -> None:
    import torch
    import torch.nn.functional as F

    from epsd.losses import no_such_class

    with pytest.raises(IndexError) as caught:
        F.cross_entropy(torch.zeros(1, 3), torch.tensor([5]))
    assert no_such_class(caught.value).startswith("a label is 5:")
    with pytest.raises(RuntimeError) as broken:
        F.one_hot(torch.tensor([5]), 3)
    assert no_such_class(broken.value).startswith("a label is too large:")


def test_a_single_value_per_channel_is_refused_in_known_words() -> None:
    import torch
    from torch import nn

    from epsd.compute.networks import is_lonely

    with pytest.raises(ValueError) as refused:
        nn.BatchNorm1d(2)(torch.zeros(1, 2))
    assert is_lonely(refused.value)


def test_what_cannot_be_differentiated_twice_says_so() -> None:
    """Three kinds: no graph, a kernel without a second derivative, a function that refuses it."""
    import torch
    import torch.nn.functional as F
    from torch.autograd.function import once_differentiable

    from epsd.pruning.scoring import MetaGradientError
    from epsd.pruning.unroll import contract, gradient_of

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 2 * ctx.saved_tensors[0] * gradient

    weights = {"w": torch.rand(3, requires_grad=True)}
    with pytest.raises(MetaGradientError):
        gradient_of(torch.zeros(()), weights, create_graph=True)
    for function in (F.hardsigmoid, Once.apply):
        gradient = gradient_of(function(weights["w"]).square().sum(), weights, create_graph=True)
        with pytest.raises(MetaGradientError):
            contract(gradient, [torch.ones(3)], weights)


def test_refused_hooks_give_the_words_that_they_were_refused_with() -> None:
    from torch.autograd import graph

    with (
        pytest.raises(RuntimeError, match="not here"),
        graph.disable_saved_tensors_hooks("not here"),
        graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        pass


def test_a_process_that_is_gone_is_told_in_known_words() -> None:
    """Those of the system, and those that are written in torch's own libraries, wherever they are installed."""
    import errno

    import torch

    from epsd.compute import distributed

    system = {os.strerror(errno.ECONNRESET), os.strerror(errno.EPIPE)}
    assert system < set(distributed._LOST)
    folder = Path(torch.__file__).parent / "lib"
    places = {"NCCL error": "libtorch_cuda.so"}
    for words in set(distributed._LOST) - system:
        library = folder / places.get(words, "libtorch_cpu.so")
        if library.is_file():  # a build without CUDA has no NCCL; macOS and Windows name their libraries otherwise
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                assert content.find(words.encode()) >= 0, words


# --- torchvision and timm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detectors() -> dict[str, Any]:
    """One of each kind around a small network, the losses of one picture, and the samples counted in them."""
    import torch

    from epsd.architectures.resnet import ResNet
    from epsd.detection import whole_batch
    from epsd.detectors import DETECTORS, Picture

    def made(name: str, **settings: Any) -> SimpleNamespace:
        model = ResNet(depth=20, width=0.25)(10, (1, 8, 8))
        detector = DETECTORS[name](**settings)(model, ["layer2", "layer3"], Picture(48, 48, [0.2], [0.3]), 10)
        target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([3])}
        with whole_batch.Whole(detector) as whole:
            whole.begin(0, 0)
            return SimpleNamespace(net=detector, losses=detector([torch.rand(1, 48, 48)] * 2, [target] * 2))

    small = {"channels": 32, "extra_levels": 1}
    return {
        "faster_rcnn": made("faster_rcnn", **small, head_width=32, proposals=20, roi_samples=16, anchor_samples=16),
        "ssd": made("ssd", **small),
    }


def test_faster_rcnn_draws_its_samples_where_they_are_caught(detectors: dict[str, Any]) -> None:
    from epsd.detection import whole_batch

    found = detectors["faster_rcnn"]
    for part, losses in whole_batch._DRAWN.items():
        sampler = getattr(found.net, part).fg_bg_sampler
        assert list(inspect.signature(sampler.__call__).parameters) == ["matched_idxs"]
        assert set(losses) <= set(found.losses)


def test_ssd_counts_its_boxes_where_they_are_caught(detectors: dict[str, Any]) -> None:
    from epsd.detection import whole_batch

    found = detectors["ssd"]
    assert hasattr(found.net, "neg_to_pos_ratio") and set(whole_batch._MATCHED) == set(found.losses)
    taken = list(inspect.signature(found.net.compute_loss).parameters)
    assert taken == ["targets", "head_outputs", "anchors", "matched_idxs"]


def test_detectors_pad_pictures_where_it_is_caught(detectors: dict[str, Any]) -> None:
    for found in detectors.values():
        assert found.net.transform.max_by_axis([[1, 4, 3], [1, 2, 5]]) == [1, 4, 5]


def test_layers_that_are_known_by_the_name_of_their_class() -> None:
    from torchvision.ops import misc

    assert misc.FrozenBatchNorm2d.__name__ == "FrozenBatchNorm2d"
    layers = pytest.importorskip("timm.layers")
    from epsd.architectures import timm_zoo

    assert all(hasattr(layers, name) for name in timm_zoo._STANDARDISED)


# --- mlflow ---------------------------------------------------------------------------------------------------------


def test_mlflow_tries_a_database_as_often_as_it_is_told() -> None:
    from mlflow.store.db import utils

    assert "attempts < MAX_RETRY_COUNT" in inspect.getsource(utils)


def test_mlflow_hears_the_variables_that_are_set() -> None:
    import mlflow.environment_variables as known

    from epsd.tracking import models, store

    told = {*store._HTTP, *models.PLAIN}
    told |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_DISABLE_TELEMETRY"}
    missing = [name for name in told if name.startswith("MLFLOW_") and not hasattr(known, name)]
    assert not missing


def test_mlflow_serves_by_the_function_that_is_wrapped() -> None:
    from mlflow.pyfunc import scoring_server

    assert "to_thread(invocations, " in inspect.getsource(scoring_server.init)
    assert scoring_server.BAD_REQUEST and issubclass(scoring_server.MlflowException, Exception)


def test_mlflow_names_its_tags_as_they_are_written() -> None:
    from mlflow.utils import mlflow_tags

    written = {
        "mlflow.data.context", "mlflow.note.content", "mlflow.parentRunId", "mlflow.source.git.commit",
        "mlflow.source.name", "mlflow.source.type", "mlflow.user",
    }  # fmt: skip
    assert written <= {value for value in vars(mlflow_tags).values() if isinstance(value, str)}


def test_mlflow_names_its_errors_as_they_are_known() -> None:
    from mlflow.protos.databricks_pb2 import ErrorCode

    from epsd.tracking import store

    assert store._REFUSALS | {"ENDPOINT_NOT_FOUND"} <= set(ErrorCode.keys())


def test_mlflow_keeps_addresses_in_known_columns() -> None:
    """A store whose folder was moved is mended table by table; an address in a new column would stay behind."""
    from mlflow.store.model_registry.dbmodels import models as registry
    from mlflow.store.tracking.dbmodels import models as tracking

    from epsd.tracking import relocation

    tables = [table for base in (registry.Base, tracking.Base) for table in base.metadata.tables.values()]
    columns = {table.name: {column.name for column in table.columns} for table in tables}
    assert all(column in columns[table] for table, column in relocation._RELOCATED.items())
    told = {table: name for table, names in columns.items() for name in names if name in relocation._RELOCATED.values()}
    assert told == relocation._RELOCATED


def test_mlflow_writes_models_in_the_forms_that_are_asked_for() -> None:
    import mlflow.pytorch

    assert "serialization_format" in inspect.signature(mlflow.pytorch.save_model).parameters
    assert "model.pt2" in inspect.getsource(mlflow.pytorch)


# --- dvc ------------------------------------------------------------------------------------------------------------


def test_dvc_tells_a_stage_where_it_is_and_what() -> None:
    from dvc import env
    from dvc.stage import run

    for name in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_NO_ANALYTICS"):
        assert getattr(env, name) == name
    stage = SimpleNamespace(wdir=".", repo=SimpleNamespace(root_dir="here"), addressing="train", cmd="true")
    given = run.prepare_kwargs(stage, {"DVC_EXP_NAME": "bold-name"})["env"]
    assert given["DVC_STAGE"] == "train" and given["DVC_EXP_NAME"] == "bold-name"
    assert given["DVC_ROOT"] == os.environ.get("DVC_ROOT", "here")
