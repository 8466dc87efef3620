"""The model card beside the weights: README.md."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from lillama.plan.plan import Plan
from lillama.recipe.schema import Quantize, Recipe


def model_card(recipe: Recipe, plan: Plan, auto_class: str, bits: Quantize | None = None) -> str:
    """The card of a run's checkpoint, which `auto_class` of transformers opens; hubs read what stands on top.

    `bits`: how its weights were put into few bits.
    """
    original = recipe.model.id
    data = ModelCardData(
        base_model=None if original.startswith(("package:", ".", "/")) else original,
        library_name="transformers",
        tags=["lillama", "low-rank", *(["quantized"] if bits else [])],
    )
    kept = ""
    if plan.shapes():
        gone, every = plan.neurons
        kept = f"{gone:,} of the {every:,} neurons of its MLPs were removed, not as many from each.\n\n"
    if bits:
        widths = " or ".join(map(str, bits.widths))
        kept += f"Weights are whole numbers of {widths} bits, with a scale for every {bits.group_size} of them.\n\n"
    return (
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# {Path(original.removeprefix('package:')).name}, {plan.reduction:.0%} smaller\n\n"
        f"{plan.before:,} parameters became {plan.after:,} by low-rank feature distillation "
        f"(Lillama, arXiv 2412.16719): strategy {plan.strategy}, {plan.storage} storage, "
        f"{recipe.compress.init} init, loss {recipe.distill.loss}, {recipe.distill.schedule} schedule.\n\n"
        f"{kept}"
        "```python\nimport lillama  # teaches transformers the format\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("PATH_OR_ID")\n```\n\n'
        f"The recipe:\n\n```yaml\n{recipe.to_yaml()}```\n"
    )
