"""Calibration data for models that eat something else than a causal model's text: pairs of texts, images, sound."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lillama.data.audio import read_clips
from lillama.data.rows import load_rows
from lillama.data.text import token_blocks
from lillama.errors import LillamaError
from lillama.pretrained.locate import explained, read_configuration, read_tokenizer, resolve

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from lillama import Recipe
    from lillama.base.progress import Progress

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
COLUMNS = ("image", "img", "pixel_values")
NEW_TOKENS = 64  # that a decoder writes for every text
Batch = dict[str, Tensor]


def calibration_batches(model: PreTrainedModel, recipe: Recipe, progress: Progress) -> list[Batch] | None:
    """Batches for `model`, by what its forward pass takes first; None: text, which the host reads."""
    main = model.main_input_name
    if main == "pixel_values":
        return image_batches(model, recipe, progress)
    if main in ("input_values", "input_features"):
        return sound_batches(model, recipe, progress)
    takes = inspect.signature(type(model).forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        return text_pairs(recipe, progress)
    return None


def image_batches(model: PreTrainedModel, recipe: Recipe, progress: Progress) -> list[Batch]:
    """Batches {"pixel_values"} of a folder of images, or of a data set with a column of them."""
    from transformers import AutoImageProcessor

    with explained(f"the image processor of '{recipe.model.id}'", "model.id"):
        processor = AutoImageProcessor.from_pretrained(resolve(recipe.model)[0], revision=recipe.model.revision)
    images = list(itertools.islice(_images(recipe), recipe.calibration.rows))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.calibration.seed)).tolist()
    batches = []
    with progress.phase("read images", len(images)) as bar:
        for part in _parts(order, recipe.distill.batch_size):
            found = processor(images=[images[i]().convert("RGB") for i in part], return_tensors="pt")
            batches.append({"pixel_values": found["pixel_values"].to(torch.float32)})
            bar.advance(len(part))
    return batches


def _images(recipe: Recipe) -> Iterator[Any]:
    """What opens each image of the calibration data."""
    import PIL.Image

    section = recipe.calibration
    dataset = section.one_dataset()
    folder = Path(dataset).expanduser()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES) if folder.is_dir() else []
    if files:
        for file in files:
            yield lambda file=file: PIL.Image.open(file)
        return
    rows = load_rows(dataset, config=section.config, split=section.split, where="calibration")
    column = next((name for name in (section.column, *COLUMNS) if name in rows.column_names), None)
    if column is None:
        raise LillamaError(
            f"'{dataset}' has no column of images; it has {', '.join(rows.column_names)}",
            where="calibration.column",
            hint="Name the column, or give a folder of images.",
        )
    for number in range(len(rows)):
        yield lambda number=number: _opened(rows[number][column])


def _opened(value: Any) -> Image:
    """An image of a row: decoded already, or its bytes, or its path."""
    import io

    import PIL.Image

    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
    return PIL.Image.open(value)


def sound_batches(model: PreTrainedModel, recipe: Recipe, progress: Progress) -> list[Batch]:
    """Batches of what the model's own feature extractor makes of clips of sound, padded with a mask.

    With a decoder, what the original itself writes for each clip is what its decoder is fed.
    """
    from transformers import AutoFeatureExtractor

    with explained(f"the feature extractor of '{recipe.model.id}'", "model.id"):
        extractor = AutoFeatureExtractor.from_pretrained(resolve(recipe.model)[0], revision=recipe.model.revision)
    section, rate = recipe.calibration, extractor.sampling_rate
    clips = read_clips(
        section.one_dataset(), config=section.config, split=section.split, column=section.column, rate=rate,
        where="calibration", fraction=section.fraction, seed=section.seed,
    )  # fmt: skip
    takes = inspect.signature(type(model).forward).parameters
    writer = _Writer(recipe) if model.config.is_encoder_decoder and "decoder_input_ids" in takes else None
    # Some hear pieces of one length only, and pad to it unless they are told otherwise.
    padding = inspect.signature(type(extractor).__call__).parameters["padding"].default or True
    batches = []
    with progress.phase("read sound", len(clips)) as bar:
        for part in _parts(itertools.islice(clips, section.rows), recipe.distill.batch_size):
            samples = [clip.samples for clip in part]
            found = extractor(samples, sampling_rate=rate, padding=padding, return_tensors="pt")
            heard = {name: value for name, value in found.items() if name in takes}
            batches.append(heard | (writer.write(heard) if writer else {}))
            bar.advance(len(part))
    return batches


def text_pairs(recipe: Recipe, progress: Progress) -> list[Batch]:
    """Blocks of text for the encoder, and what the original itself writes for each, which its decoder is fed."""
    where, gguf = resolve(recipe.model)
    tokenizer = read_tokenizer(recipe.model, where, gguf, Path())
    blocks = token_blocks(tokenizer, recipe.calibration)
    writer = _Writer(recipe)
    batches = []
    with progress.phase("let the original write", len(blocks)) as bar:
        for part in blocks.split(recipe.distill.batch_size):
            batches.append({"input_ids": part, **writer.write({"input_ids": part})})
            bar.advance(len(part))
    return batches


class _Writer:
    """The original, which writes what its decoder is fed."""

    def __init__(self, recipe: Recipe) -> None:
        from lillama.base import device
        from lillama.checkpoint.open import open_model
        from lillama.host import get

        where, trust = resolve(recipe.model)[0], recipe.model.trust_remote_code
        with explained(f"the configuration of '{recipe.model.id}'", "model.id"):
            config = read_configuration(where, revision=recipe.model.revision, trust=trust)
        self.place = device.choose(recipe.run.device, recipe.run.compute).device
        self.model = open_model(where, torch.float32, get().auto_class(config, recipe), trust).to(self.place)
        self.pad = self.model.generation_config.pad_token_id
        # What its decoder begins with has to have room besides.
        self.most = min(NEW_TOKENS, (getattr(config, "max_target_positions", None) or 2 * NEW_TOKENS) // 2)

    @torch.no_grad()
    def write(self, given: Batch) -> Batch:
        """The ids [B, T] that the decoder writes for a batch, but the last, which it never reads, and their mask."""
        said = self.model.generate(
            **{name: value.to(self.place) for name, value in given.items()},
            max_new_tokens=self.most,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,  # with what the decoder begins with, which some leave out otherwise
        )
        written = said["sequences"].cpu()
        written = written[:, :-1] if written.shape[1] > 1 else written
        mask = torch.ones_like(written)
        if self.pad is not None:
            mask[:, 1:] = (written[:, 1:] != self.pad).long()
        return {"decoder_input_ids": written, "decoder_attention_mask": mask}


def _parts(items: Any, size: int) -> Iterator[list[Any]]:
    """Lists of at most `size`."""
    left = iter(items)
    while part := list(itertools.islice(left, size)):
        yield part
