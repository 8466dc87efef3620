"""What vLLM's entry point calls: the checkpoints of lillama become one of its quantisation methods."""

from __future__ import annotations


def register() -> None:
    """Have vLLM know the method `lillama`. It may be called any number of times, in every process of a server."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from lillama.checkpoint.quantizer import METHOD
    from lillama.serving.config import LowRankConfig

    register_quantization_config(METHOD)(LowRankConfig)
