"""Every architecture plugin passes the same contract."""

from __future__ import annotations

import pytest
from conftest import CONFIGS, tiny

from lillama.testing import check_architecture


@pytest.mark.parametrize("name", CONFIGS)
def test_decoders_pass_the_contract(name, tmp_path):
    check_architecture(tiny(name), tmp_path, plugin="decoder")
