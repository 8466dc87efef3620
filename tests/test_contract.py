"""Every architecture plugin passes the same contract."""

from __future__ import annotations

import pytest
from conftest import CONFIGS, tiny

from lillama.testing import check_architecture


# One of them in `make test`: each loads what it saved in processes that begin anew.
@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_decoders_pass_the_contract(name, tmp_path):
    check_architecture(tiny(name), tmp_path, plugin="decoder")
