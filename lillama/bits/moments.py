"""What rounding is to know of a model in memory: which inputs reach a weight, and how much errors behind it matter.

The model runs forwards and back on calibration data, the loss being that of tokens drawn from its own predictions, as
for the sensitivity of the original (factorise/sensitivity.py), and inputs count as there: by c = |g|^2 / (|g|^2 + its
mean), so that positions which no prediction depends on do not decide. H = sum c x x^T / sum c, d_in x d_in, and
G = sum g g^T / tokens, d_out x d_out, are kept whole. Where they would take too much memory together, the model runs
several times, for some of its weights each.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lillama.base import ranks, shares
from lillama.base.device import Device, factorising, free_memory, send
from lillama.base.progress import Progress
from lillama.contract import WeightKind
from lillama.errors import LillamaError
from lillama.factorise.sums import add_symmetric, mirrored
from lillama.lowrank.experts import LowRankExperts
from lillama.lowrank.swap import module_of
from lillama.pretrained.calls import arguments, find_mask, run_model
from lillama.pretrained.order import drawn_order
from lillama.pretrained.players import main_output, predicts_classes
from lillama.pretrained.predictions import divergence, draw_tokens

AT_ONCE = 2 << 30  # bytes of moments that are in memory together
SHARE = 0.25  # of a card's free memory, that moments may take: the way back wants the rest
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Moments:
    """Of one weight, or stacked for every expert: H of its inputs and G of the gradients at its outputs."""

    inputs: Tensor
    outputs: Tensor

    def of_copy(self, copy: int) -> Moments:
        """Those of one expert."""
        return Moments(self.inputs[copy], self.outputs[copy])


@dataclass(frozen=True)
class Wanted:
    """A weight of which moments are wanted: `shape` is (d_out, d_in) or (copies, d_out, d_in)."""

    name: str
    kind: WeightKind
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What its moments take, in float32."""
        *copies, d_out, d_in = self.shape
        return 4 * (d_out**2 + d_in**2) * (copies[0] if copies else 1)


@dataclass(frozen=True)
class Reading:
    """The data, how much of it, and where the model runs."""

    batches: Sequence[Mapping[str, Tensor]]
    tokens: int
    device: Device
    progress: Progress
    seed: int = 0


def gather(model: Any, wanted: Sequence[Wanted], reading: Reading) -> Iterator[tuple[Wanted, Moments]]:
    """The moments of every weight, some at a time, as their turn comes; the model is as it was in between.

    Raises LillamaError where no prediction depends on anything, so that nothing can be known.
    """
    batches = _cut(reading.batches, reading.tokens)
    for some in passes(wanted):
        place = _place_of(some, reading.device.device)
        sums = {one.name: _Sums(one, place) for one in some}
        with (
            reading.progress.phase("what rounding depends on", len(batches)) as bar,
            _listening(model, some, sums),
            _without_gradients(model),
        ):
            tokens = 0
            # Each draws tokens of its own, the same in every pass. The processes of the run share the batches out.
            for number, batch in shares.share([*enumerate(batches)]):
                tokens += _run(model, batch, reading.device, reading.seed + number)
                bar.advance(len(batches[number : number + ranks.world()]))
        ranks.sum_(part for one in sums.values() for part in (one.inputs, one.outputs, one.counted))
        tokens = round(ranks.summed([tokens])[0])
        with reading.progress.phase("round", len(some)) as bar:
            for one in some:
                bar.describe(one.name)
                yield one, sums.pop(one.name).moments(tokens, reading.device.device)
                bar.advance()  # by now, whoever asked for it is done with it


def _place_of(some: Sequence[Wanted], device: torch.device) -> torch.device:
    """Where the moments of weights are summed: on a card with room, so that it is not waited for; else on the host."""
    room = (free_memory(device) or 0) * SHARE
    return device if sum(one.bytes for one in some) <= room else torch.device("cpu")


def passes(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """The weights whose moments are in memory together."""
    rest = list(wanted)
    while rest:
        sizes = itertools.accumulate(one.bytes for one in rest)
        count = max(sum(size <= AT_ONCE for size in sizes), 1)
        yield rest[:count]
        rest = rest[count:]


def _cut(batches: Sequence[Mapping[str, Tensor]], tokens: int) -> list[Mapping[str, Tensor]]:
    """As many batches, drawn from all of them, as hold about so many tokens."""
    found: list[Mapping[str, Tensor]] = []
    for batch in (batches[number] for number in drawn_order(len(batches), 0)):
        if tokens <= 0:
            break
        found.append(batch)
        ids = next((batch[n] for n in ("decoder_input_ids", "input_ids") if n in batch), next(iter(batch.values())))
        tokens -= ids.shape[0] * (ids.shape[1] if ids.dim() > 1 else 1)
    return found


def _run(model: Any, batch: Mapping[str, Tensor], where: Device, seed: int) -> int:
    """Forwards and back over one batch; how many tokens were predicted."""
    device = where.device
    generator = torch.Generator(device).manual_seed(seed)
    given = {name: send(value, device) for name, value in arguments(dict(batch)).items()}
    with torch.enable_grad(), where.autocast():
        outputs = run_model(model, given)
        logits = main_output(outputs)
        mask = find_mask(dict(batch), logits.shape[:-1])
        logits = logits.flatten(0, -2) if mask is None else logits[mask.to(device).bool()]
        if predicts_classes(outputs):
            loss = divergence(logits, draw_tokens(logits, generator))
        else:  # as if features were drawn around what the model says, with a variance of one
            noise = torch.randn(logits.shape, generator=generator, device=device)
            loss = (logits.float() * noise).sum()
    if not loss.requires_grad:
        raise LillamaError(
            "no gradient comes back from the model's predictions to its weights, so nothing says how to round them",
            where="quantize.method",
            hint="Use quantize.method: nearest.",
        )
    loss.backward()
    return len(logits)


class _Sums:
    """The sums of one weight, of every copy for itself."""

    def __init__(self, wanted: Wanted, place: torch.device) -> None:
        *copies, d_out, d_in = wanted.shape
        self.stacked = bool(copies)
        count = copies[0] if copies else 1
        self.inputs = torch.zeros(count, d_in, d_in, device=place)
        self.outputs = torch.zeros(count, d_out, d_out, device=place)
        self.counted = torch.zeros(count, device=place)

    def add(self, x: Tensor, g: Tensor, copy: int = 0) -> None:
        """Count inputs x [.., d_in] and the gradients g [.., d_out] at what the weight makes of them."""
        x, g = x.detach().flatten(0, -2).float(), g.detach().flatten(0, -2).float()
        if not len(x):
            return
        length = g.square().sum(-1, keepdim=True)
        counts = length / (length + length.mean().clamp_min(TINY))
        add_symmetric(self.inputs[copy], x * counts, x)
        add_symmetric(self.outputs[copy], g, g)
        self.counted[copy] += counts.sum().to(self.counted.device)

    def moments(self, tokens: int, device: torch.device) -> Moments:
        """What was summed, per token, where it is used. An expert that nothing reached borrows from the others."""
        inputs, outputs = mirrored(self.inputs), mirrored(self.outputs)
        H = inputs.sum(0) / self.counted.sum().clamp_min(TINY)
        seen = self.counted[:, None, None]
        each = torch.where(seen > 0, inputs / seen.clamp_min(TINY), H)
        place = factorising(device)
        each, outputs = each.to(place), (outputs / tokens).to(place)
        return Moments(each, outputs) if self.stacked else Moments(each[0], outputs[0])


@contextlib.contextmanager
def _listening(model: nn.Module, wanted: Sequence[Wanted], sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Let what passes through the weights be counted for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        for one in wanted:
            module: Any = model.get_submodule(module_of(one.name, one.kind))
            if one.kind == "experts":
                stack.enter_context(_experts(module, one.name.rpartition(".")[2], sums[one.name]))
            else:
                stack.callback(module.register_forward_hook(_hook(sums[one.name]), with_kwargs=True).remove)
        yield


def _hook(sums: _Sums) -> Callable[..., None]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        x = next(iter((*args, *kwargs.values())))
        source = out if out.requires_grad else out.requires_grad_(True)
        source.register_hook(lambda gradient: sums.add(x, gradient))

    return hook


@contextlib.contextmanager
def _experts(module: LowRankExperts, projection: str, sums: _Sums) -> Iterator[None]:
    """The same for a projection of experts, which compute one by one meanwhile."""
    through, config, own = module._through, module.config, module.__dict__.get("_through")

    def listen(name: str, x: Tensor, products: Any, expert: Any) -> Tensor:
        y = through(name, x, products, expert)
        if name == projection and isinstance(expert, int):
            source = y if y.requires_grad else y.requires_grad_(True)
            source.register_hook(lambda gradient: sums.add(x, gradient, expert))
        return y

    module.__dict__["_through"], module.config = listen, None  # None: one by one
    try:
        yield
    finally:
        module.config = config
        module.__dict__.pop("_through")
        if own is not None:
            module.__dict__["_through"] = own


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters get no gradients, and nothing drops out, for as long as the block lasts."""
    learn, training = [p for p in model.parameters() if p.requires_grad], model.training
    for parameter in learn:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in learn:
            parameter.requires_grad_(True)
        model.train(training)
