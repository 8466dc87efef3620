"""vLLM serves what lillama compressed: run by `make test-serve`, in an environment that has vLLM (docs/serving.md)."""

from __future__ import annotations

import gc
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Of several processes that test side by side, each has a core of its own.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(CORES[WORKER % len(CORES)]))
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# In this process: an engine of its own would take fifteen seconds to import what is here already.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]
else:
    import pytest

    # Before any engine: vLLM's general model changes classes of transformers for as long as the process lives.
    import references

    NEW = references.NEW

    @dataclass
    class Made:
        """A compressed model in a directory, and what transformers says to each prompt."""

        directory: Path
        prompts: list[list[int]]
        tokens: list[list[int]]

    @pytest.fixture(scope="session")
    def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
        root = tmp_path_factory.mktemp("models")
        found = {}
        for name, build in references.MODELS.items():
            directory = build(root / name)
            found[name] = Made(directory, references.PROMPTS, references.tokens(directory))
        return found

    @pytest.fixture
    def engine() -> Any:
        """Starts engines in this process, one at a time; those of several processes start these themselves."""
        from vllm import LLM

        def start(directory: Path, **options: Any) -> LLM:
            if options.get("tensor_parallel_size", 1) == 1:
                options["distributed_executor_backend"] = "uni"
            usual: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 16}
            return LLM(str(directory), **{**usual, "enable_prefix_caching": False, **options})

        yield start
        # An engine that refused its model left the groups of its processes behind.
        from vllm.distributed import cleanup_dist_env_and_memory

        gc.collect()
        cleanup_dist_env_and_memory()
