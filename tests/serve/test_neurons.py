"""MLPs that lost neurons are received as narrow as they are, and refused where that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lillama.errors import LillamaError
from lillama.serving.receiver import Receiver


class _Layer(nn.Module):
    """What a receiver asks of an engine's layer: sizes, and a loader that knows its shards."""

    def __init__(self, outputs: list[int], inputs: int, processes: int = 1) -> None:
        super().__init__()
        self.output_sizes, self.output_size, self.input_size = outputs, sum(outputs), inputs
        self.tp_size, self.bias = processes, None

    def weight_loader(self, parameter: torch.nn.Parameter, tensor: torch.Tensor, shard: int = 0) -> None:
        start = sum(self.output_sizes[:shard])
        parameter.data[start : start + self.output_sizes[shard]].copy_(tensor)


def _received(layer: _Layer, matrices: list[torch.Tensor]) -> Receiver:
    received = Receiver(layer, "mlp.gate_up_proj", layer.output_size, torch.float32)
    received.narrows = True
    for shard, W in enumerate(matrices):
        received.take("weight", None, W, shard if len(matrices) > 1 else None)
    return received


def test_an_mlp_that_lost_neurons_has_fewer_outputs_in_the_order_of_its_matrices():
    gate, up, down = torch.randn(5, 6), torch.randn(5, 6), torch.randn(6, 5)
    x = torch.randn(3, 6)
    merged = _received(_Layer([8, 8], 6), [gate, up])
    assert torch.allclose(merged.build()(x), torch.cat([x @ gate.T, x @ up.T], -1), atol=1e-6)
    last = _received(_Layer([6], 8), [down])
    assert torch.allclose(last.build()(x[:, :5]), x[:, :5] @ down.T, atol=1e-6)


def test_an_mlp_that_lost_neurons_is_refused_where_it_does_not_fit():
    gate, up = torch.randn(5, 6), torch.randn(4, 6)
    with pytest.raises(LillamaError, match="another number of neurons"):
        _received(_Layer([8, 8], 6), [gate, up])
    with pytest.raises(LillamaError, match="cannot be split between processes"):
        _received(_Layer([8, 8], 6, processes=2), [gate])
    with pytest.raises(LillamaError, match="the layer has 6 inputs and 8 outputs"):
        _received(_Layer([8, 8], 6), [torch.randn(9, 6)])
    received = _received(_Layer([8, 8], 6), [])
    with pytest.raises(LillamaError, match="bias of an MLP that lost neurons"):
        received._load_bias(torch.zeros(16), torch.zeros(5), 0)
