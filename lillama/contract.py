"""What a plugin tells the host about a model: its layers and the weights that may be factorised."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lillama.errors import LillamaError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

WeightKind = Literal["linear", "embedding", "experts"]
LayerKind = Literal["block", "embedding", "head"]


@dataclass(frozen=True)
class Weight:
    """One matrix of a layer that may be factorised.

    `name` is the dotted name of its module in the whole model, that of the layer where the layer is itself one weight
    (an embedding, a head); `shape` is (d_out, d_in), of an embedding (vocabulary, width); `copies` is how many such
    matrices are stacked (experts); weights of one `group` see the same input and share one Gram matrix; `tied` names
    the embedding's weight that this one, a head's, is the same as: one pair of factors serves both. `whole` is the
    shape in the original, where some neurons of an MLP are gone: `shape` is what is left.
    """

    name: str
    shape: tuple[int, int]
    copies: int = 1
    kind: WeightKind = "linear"
    group: str | None = None
    tied: str | None = None
    whole: tuple[int, int] | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the dense weight holds, bias not counted; none of its own where it is tied."""
        if self.tied:
            return 0
        return self.shape[0] * self.shape[1] * self.copies

    @property
    def original_parameters(self) -> int:
        """The same of the original, all neurons counted."""
        return self.parameters if self.whole is None else self.whole[0] * self.whole[1] * self.copies


@dataclass(frozen=True)
class Neurons:
    """An MLP inside a layer: its `entries` give every neuron a number each, its `exit` reads one of every neuron.

    They are names of the layer's weights. What exit reads of a neuron depends on what entries put out for this neuron
    alone, so that a row of every entry and a column of exit can be removed together. An MLP without a gate has one
    entry. `biases` are the entries with a bias, of which a number goes with every neuron.
    """

    entries: tuple[str, ...]
    exit: str
    biases: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of all of them."""
        return (*self.entries, self.exit)


@dataclass(frozen=True)
class Layer:
    """The unit of distillation: one module whose output the student must reproduce.

    Layers are listed in the order the stream runs through them, the ones that are only passed
    through (`weights=()`) included. A `block` maps hidden states to hidden states, an `embedding` token
    ids to hidden states, a `head` hidden states to logits; a head is the last layer.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    kind: LayerKind = "block"
    neurons: tuple[Neurons, ...] = ()

    @classmethod
    def of_linears(
        cls, model: nn.Module, name: str, groups: Sequence[Sequence[str]], neurons: Sequence[str] = ()
    ) -> Layer:
        """The block `name` of `model`, its linears (`nn.Linear`, Conv1D) grouped by common input.

        `groups` lists module names relative to the block, e.g. (("attn.q", "attn.k"), ("attn.o",)); names
        the block lacks are passed over, so one table can serve relatives of a family. A linear whose class computes
        something else than W x + b (a router that picks, a grouped product) is left out, with a warning that names it.
        `neurons` names the linears of an MLP, the one that ends it last, e.g. ("mlp.gate", "mlp.up", "mlp.down"): see
        `Neurons`. Where the block lacks one of them, or they do not fit together, it is passed over.
        """
        from torch import nn

        from lillama.dense.plain import is_linear, matrix

        block = model.get_submodule(name)
        modules = dict(block.named_modules())
        weights = []
        for group in groups:
            for relative in group:
                linear = modules.get(relative)
                if linear is not None and is_linear(linear):
                    d_out, d_in = matrix(linear).shape
                    weights.append(Weight(f"{name}.{relative}", (d_out, d_in), group=f"{name}.{group[0]}"))
                elif isinstance(linear, nn.Linear):
                    log.warning("%s.%s stays dense: %s has a forward of its own", name, relative, _class(linear))
        _check_groups(name, groups, [n for n, m in modules.items() if isinstance(m, nn.Linear) or is_linear(m)])
        listed = {weight.name for weight in weights} >= {f"{name}.{one}" for one in neurons}
        return cls(name, tuple(weights), neurons=find_neurons(block, name, neurons) if listed else ())

    @classmethod
    def of_experts(cls, model: nn.Module, name: str) -> tuple[Weight, ...]:
        """The weights of the module of fused experts `name` of `model`, in the order they run.

        They are `<name>.gate` (where experts have a gate), `<name>.up` and `<name>.down`, each of as many copies as
        there are experts. Empty where the module holds no experts, or ones of a layout that is not served (a warning
        says why).
        """
        from lillama.dense.experts import experts_layout, why_not

        module = model.get_submodule(name)
        layout = experts_layout(module)
        if layout is None:
            if reason := why_not(module):
                log.warning("%s stays dense: %s holds experts that are not served: %s", name, _class(module), reason)
            return ()
        weights = []
        for projection in layout.projections:
            copies, d_out, d_in = layout.weight(module, projection).shape
            group = f"{name}.{'in' if projection in layout.entries else projection}"
            weights.append(Weight(f"{name}.{projection}", (d_out, d_in), copies, "experts", group))
        return tuple(weights)

    @classmethod
    def of_embedding(cls, model: nn.Module) -> Layer:
        """The model's token embedding as a layer with one weight.

        It may do something with the vectors it looks up (scale them). Raises ValueError where it does anything else.
        """
        from torch import nn

        from lillama.dense.plain import is_embedding

        name = _find(model, "get_input_embeddings", nn.Embedding)
        embedding: Any = model.get_submodule(name)
        if not is_embedding(embedding):
            raise ValueError(f"{name} is a {_class(embedding)}, which does more than look vectors up and work on these")
        shape = (embedding.num_embeddings, embedding.embedding_dim)
        return cls(name, (Weight(name, shape, kind="embedding"),), kind="embedding")

    @classmethod
    def of_head(cls, model: nn.Module) -> Layer:
        """The model's output head as a layer with one weight, tied where its matrix is the embedding's.

        Raises ValueError where it is no linear that computes W x + b.
        """
        from torch import nn

        from lillama.dense.plain import is_linear

        name = _find(model, "get_output_embeddings", nn.Linear)
        head: Any = model.get_submodule(name)
        if not is_linear(head):
            raise ValueError(f"{name} is a {_class(head)}, whose forward is its own")
        inputs = model.get_input_embeddings()  # type: ignore[operator]
        tied = _find(model, "get_input_embeddings", nn.Module) if inputs.weight is head.weight else None
        weight = Weight(name, (head.out_features, head.in_features), tied=tied)
        return cls(name, (weight,), kind="head")


def find_neurons(block: nn.Module, name: str, linears: Sequence[str]) -> tuple[Neurons, ...]:
    """The MLP of these linears of the block called `name`, the last its exit; none where they do not fit together."""
    from torch import nn

    modules = dict(block.named_modules())
    found: list[Any] = [modules.get(one) for one in linears]
    if len(found) < 2 or any(type(one) is not nn.Linear for one in found):
        return ()
    *entries, last = found
    width = last.in_features
    # Statistics are of the smaller side of a weight: that of the hidden states.
    if width < last.out_features or any(one.out_features != width or width < one.in_features for one in entries):
        return ()
    names = [f"{name}.{one}" for one in linears]
    biases = tuple(one for one, module in zip(names, entries) if module.bias is not None)
    return (Neurons(tuple(names[:-1]), names[-1], biases),)


def _check_groups(block: str, groups: Sequence[Sequence[str]], linears: Sequence[str]) -> None:
    """LillamaError where `groups` names no linear of the block, or misspells one that it does not list."""
    listed = [name for group in groups for name in group]
    left = [name for name in linears if name not in listed]
    for name in listed:
        if name in linears:
            continue
        near = [one for one in left if abs(len(one) - len(name)) <= 1]
        if not set(listed) & set(linears) or difflib.get_close_matches(name, near, 1, 0.85):
            raise LillamaError(
                f"no linear of the block is called '{name}'", where=block, hint=did_you_mean(name, linears)
            )


def _find(model: nn.Module, getter: str, kind: type) -> str:
    """The dotted name of the module that `model.getter()` returns, which must be of `kind`."""
    module = getattr(model, getter)()
    name = next((name for name, found in model.named_modules() if found is module), None)
    if name is None or not isinstance(module, kind):
        raise ValueError(f"{getter}() of {type(model).__name__} gives no {kind.__name__} of the model")
    return name


def _class(module: nn.Module) -> str:
    return type(module).__name__


def relative(weight: Weight, layer: Layer) -> str:
    """The name of a weight's module inside its layer; empty when it is the layer itself."""
    return weight.name.removeprefix(layer.name).removeprefix(".")
