"""Time of a forward and backward pass of Mamba blocks on one core: the plugin's linear scan against the stock one.

python benchmarks/mamba_scan.py [--layers 2] [--width 256] [--tokens 512]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from lillama_mamba.scan import use_linear_scan
from torch import Tensor, nn
from transformers import MambaConfig, MambaModel
from transformers.utils import logging


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forward_backward(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The blocks' output and the gradients of all parameters of the blocks."""
    y = model(inputs_embeds=x, use_cache=False).last_hidden_state
    return y, list(torch.autograd.grad(y.square().mean(), list(model.layers.parameters())))  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    config = MambaConfig(vocab_size=8, hidden_size=options.width, num_hidden_layers=options.layers)
    stock = MambaModel(config).eval()
    linear = MambaModel(config).eval()
    linear.load_state_dict(stock.state_dict())
    use_linear_scan(linear)
    x = torch.randn(1, options.tokens, options.width)

    def forward() -> None:
        with torch.no_grad():
            linear(inputs_embeds=x, use_cache=False)

    once = median_seconds(forward, options.repeats)
    both = median_seconds(lambda: forward_backward(linear, x), options.repeats)
    stock_both = median_seconds(lambda: forward_backward(stock, x), 1)
    y, gradients = forward_backward(linear, x)
    stock_y, stock_gradients = forward_backward(stock, x)
    same = torch.equal(y, stock_y) and all(torch.equal(a, b) for a, b in zip(gradients, stock_gradients))
    print(f"{options.layers} layers, width {options.width}, {options.tokens} tokens, one thread")
    print(f"forward                   {once:8.3f} s")
    print(f"forward + backward        {both:8.3f} s  = {both / (3 * once):.2f} x (3 x forward)")
    print(f"stock forward + backward  {stock_both:8.3f} s  = {stock_both / both:.1f} x the linear scan's")
    print(f"outputs and gradients bit-equal to the stock ones: {same}")


if __name__ == "__main__":
    main()
