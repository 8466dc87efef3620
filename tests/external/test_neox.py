"""The plugin passes lillama's contract; run it where the plugin is installed."""

from importlib.metadata import entry_points

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

if "neox" not in {point.name for point in entry_points(group="lillama")}:
    pytest.skip("pip install . first", allow_module_level=True)


def test_contract(tmp_path):
    from lillama.testing import check_architecture

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    check_architecture(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=61, **sizes)), tmp_path, plugin="neox")
