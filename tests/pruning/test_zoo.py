"""Networks of three libraries are cut by half: what is left computes what the gated one does, and can be trained."""

import importlib.util
import sys
from types import ModuleType

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/channels.py, which goes through all of them."""
    spec = importlib.util.spec_from_file_location("benchmark_of_channels", ROOT / "benchmarks/channels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3_small", "convnext_atto", "resnet20, padding"])
def test_half_a_network_is_the_gated_one(name: str, script: ModuleType) -> None:
    """Residual sums, depthwise and squeezing layers, LayerNorm, shortcuts that pad."""
    found = script.examined(script.ZOO[name], 0.5)
    assert 0.45 <= found.share <= 0.5
    assert found.difference.keys() == {"train", "eval"} and max(found.difference.values()) <= 1e-5
    assert found.groups > 2 * len(found.normed)
