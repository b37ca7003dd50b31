"""Which parts of a model are compiled, and what that needs."""

import shutil

import pytest
import torch

from moe.config import ModelConfig, TrainConfig
from moe.model.layer import MoELayer
from moe.train import compiling
from parallel.activation import TILED, Activation
from parallel.errors import UserError

CPU, COMPILED = torch.device("cpu"), TrainConfig(compile=True)


def test_activations_are_compiled_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for config, by in ((TrainConfig(), TILED), (COMPILED, Activation(compiled=True))):
        layer = MoELayer(ModelConfig())
        compiling.take_up(layer, config, CPU)
        assert layer.shared is not None
        assert {layer.experts.activation, layer.shared.activation} == {by}


def test_a_compiler_that_torch_finds_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for one name alone, whatever else there is."""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "some-c++" else name)
    monkeypatch.setenv("CXX", "some-c++")
    with pytest.raises(UserError, match=r"^`train.compile` needs .*, but there is no some-c\+\+: "):
        compiling.take_up(MoELayer(ModelConfig()), COMPILED, CPU)
