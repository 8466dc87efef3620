"""The contract every architecture plugin passes; call it in your plugin's own tests.

from lillama.testing import check_architecture

def test_contract(tmp_path):
    check_architecture(MyModel(MyConfig(hidden_size=32, ...)), tmp_path)
"""

from lillama.testing.batches import Batches, example_batches, token_batches
from lillama.testing.contract import check_architecture, one_and_the_same
from lillama.testing.recipes import full_rank_plan, recipe_for
from lillama.testing.streams import check_streams

__all__ = [
    "Batches",
    "check_architecture",
    "check_streams",
    "example_batches",
    "full_rank_plan",
    "one_and_the_same",
    "recipe_for",
    "token_batches",
]
