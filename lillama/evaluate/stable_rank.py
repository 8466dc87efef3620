"""Stable ranks of weights and of what the layers put out (the paper's appendix A.5)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lillama.errors import LillamaError
from lillama.evaluate.context import Context
from lillama.evaluate.perplexity import positions, windows

if TYPE_CHECKING:
    from torch import Tensor, nn

SUBSPACE = 8  # directions followed at once: the leading one converges at the rate of the ninth over the first
STEPS = 200
ACTIVATIONS = "activations"


def stable_rank(
    model: Any,
    context: Context,
    *,
    dataset: Annotated[
        str | None, Field(description="Text for the activations, as for perplexity; null: weights alone.")
    ] = None,
    config: Annotated[str | None, Field(description="Configuration of a hub data set.")] = None,
    split: Annotated[str, Field(description="Split, slices allowed: test[:10%].")] = "test",
    column: Annotated[str | None, Field(description="Column of the text; null: found by its usual names.")] = None,
    tokens: Annotated[int, Field(ge=2, description="Tokens of text, read at once.")] = 2048,
    sequence_length: Annotated[int, Field(ge=2, description="Tokens per window.")] = 512,
) -> dict[str, float]:
    """{kind of weight: mean over the layers, "activations"}: ||M||_F^2 / ||M||_2^2, at least 1 and at most the rank.

    Of every matrix in a layer (a stack of matrices counts with its mean, a factorised weight as the product), and of
    the outputs [tokens, D] of every layer. `context.details["rows"]` holds {"layer", "kind", "value"} for all. Layers
    are the modules of the longest list of equal modules of the model. Raises LillamaError where there is none.
    """
    layers = layers_of(model)
    if not layers:
        raise LillamaError("the model has no list of equal layers", where=context.where)
    rows = [row for number, layer in enumerate(layers) for row in _weights(number, layer)]
    if dataset is not None:
        found = windows(
            context.tokenizer,
            context.where,
            dataset=dataset,
            config=config,
            split=split,
            column=column,
            sequence_length=min(sequence_length, positions(model) or sequence_length),
            tokens=tokens,
        )
        rows += _activations(model, layers, found.ids, context.device)
    context.details["rows"] = rows
    kinds = dict.fromkeys(row["kind"] for row in rows)
    means = {kind: [row["value"] for row in rows if row["kind"] == kind] for kind in kinds}
    return {kind: sum(values) / len(values) for kind, values in means.items()}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the longest module list whose members are of one class; empty if none."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    # Experts are lists of equal modules too, and may be more than there are layers: they are inside of one.
    inner = {id(m) for outer in lists for child in outer for m in child.modules()}
    outer = [found for found in lists if id(found) not in inner and len({type(child) for child in found}) == 1]
    return list(max(outer, key=len, default=[]))


def _weights(number: int, layer: nn.Module) -> Iterator[dict[str, Any]]:
    """The rows of a layer's matrices. What is no parameter of a matrix shape (norms, biases, filters) is left out."""
    from lillama.lowrank.swap import factor_modules

    done: set[str] = set()
    for name, module in factor_modules(layer):
        for inside, matrix in module.matrices().items():
            done |= {f"{name}.{factor}" for factor, _ in module.named_parameters() if matrix.is_factor(factor)}
            kind = f"{name}.{inside}" if inside else name
            yield {"layer": number, "kind": kind, "value": of_matrix(matrix.product(module).detach())}
    for name, parameter in layer.named_parameters():
        if name not in done and parameter.dim() in (2, 3) and min(parameter.shape[-2:]) > 1:
            value = of_matrix(parameter.detach())
            yield {"layer": number, "kind": re.sub(r"\.weight$", "", name), "value": value}


def of_matrix(matrix: Tensor) -> float:
    """||M||_F^2 / ||M||_2^2 of a matrix, or its mean over a stack of them; 0 of a zero matrix."""
    from lillama.base.device import factorising

    if matrix.is_meta:
        raise LillamaError(
            "the model does not fit on the device, and stable ranks need its weights",
            where="evaluate.stable_rank",
            hint="Measure them with run.device: cpu.",
        )
    M = matrix.float().to(factorising(matrix.device))
    stack = M if M.dim() == 3 else M[None]
    return sum(_ratio(one) for one in stack) / len(stack)


def _ratio(M: Tensor) -> float:
    total = float(M.double().square().sum())
    return total / largest(M) if total else 0.0


def largest(M: Tensor) -> float:
    """The square of the largest singular value, by subspace iteration: a decomposition costs far more."""
    import torch

    if M.shape[0] < M.shape[1]:
        M = M.T
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(M.shape[1], min(SUBSPACE, M.shape[1]), generator=generator).to(M)
    Q = torch.linalg.qr(start).Q
    value = 0.0
    for _ in range(STEPS):
        Z = M.T @ (M @ Q)
        before, value = value, float(torch.linalg.matrix_norm(Z, 2))
        Q = torch.linalg.qr(Z).Q
        if value - before <= 1e-6 * value:
            break
    return float(torch.linalg.svdvals((M @ Q).double())[0] ** 2)


def _activations(model: Any, layers: list[nn.Module], ids: Tensor, device: str) -> Iterator[dict[str, Any]]:
    import torch

    caught: dict[int, list[Tensor]] = {number: [] for number in range(len(layers))}

    def catch(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            caught[number].append(hidden.detach().float().flatten(0, -2).cpu())

        return hook

    training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(catch(number)).remove)
        with torch.inference_mode():
            for window in ids.split(1):
                model(input_ids=window.to(device), use_cache=False)
    for number, parts in caught.items():
        if parts:
            yield {"layer": number, "kind": ACTIVATIONS, "value": of_matrix(torch.cat(parts))}
