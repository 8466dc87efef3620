"""Numbers of the original that are not finite are named where they arise, and none is ever stored."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from finite_runs import INF, NAN, SCHEDULES, run

from lillama.base import tensorfile
from lillama.errors import LillamaError
from lillama.testing import token_batches


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_number_of_the_original_that_is_not_finite_is_named(bad, schedule, tmp_path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:6] = bad
    with pytest.raises(LillamaError) as error:
        run(model, tmp_path, distill__schedule=schedule)
    said = str(error.value)
    assert "2 of 1,536 numbers are not finite" in said and "'model.layers.1.mlp.up_proj.weight'" in said
    assert "model.safetensors" in error.value.where and error.value.hint
    assert not list((tmp_path / "run").glob("layers/0001*"))


@pytest.mark.parametrize("family", ["mixtral", "mamba", "whisper", "inkuba"])
def test_so_is_one_of_every_family(family, tmp_path):
    import make

    torch.manual_seed(0)
    model = getattr(make, family)().float().eval()
    name, weight = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and "layers.1" in n][-1]
    weight.data.view(-1)[5] = NAN
    batches = make.heard(model) if family == "whisper" else token_batches(model, length=8)
    stem = name.replace("down_proj", "").replace(".experts.gate_up_proj", "")
    with pytest.raises(LillamaError, match=r"1 of .* numbers is not finite in the original's weight") as error:
        run(model, tmp_path, plugin=family, batches=batches, distill__schedule="sequential")
    assert stem.rpartition(".")[0] in str(error.value)


def test_a_weight_too_large_for_the_type_of_the_checkpoint_is_named(tmp_path):
    model = tiny()
    model.model.layers[0].input_layernorm.weight.data[0] = 1e5
    with pytest.raises(LillamaError, match=r"layers\.0\.input_layernorm\.weight', in float16"):
        run(model, tmp_path, model__dtype="float16")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("init", ["svd", "whitened", "fisher"])
def test_activations_of_the_original_that_overflow_are_named_by_layer_and_batch(schedule, init, tmp_path):
    model = tiny()
    for name in ("up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, name).weight.data *= 1e25
    place = r": .*not finite in calibration batch \d"
    if (schedule, init) == ("concurrent", "whitened"):  # whose Grams come first, and are finite for no weight after it
        place = r"\.mlp\.down_proj: .*not finite"
    with pytest.raises(LillamaError, match=rf"model\.layers\.1{place}") as error:
        run(model, tmp_path, distill__schedule=schedule, compress__init=init)
    assert "run.compute: float32" in error.value.hint


def test_statistics_that_overflow_are_named_by_weight(tmp_path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data *= 1e25  # the layer's output is finite, its square is not
    with pytest.raises(LillamaError, match=r"model\.layers\.1\.mlp\.down_proj: .*activations.*not finite"):
        run(model, tmp_path, distill__schedule="sequential")


def test_nothing_that_is_not_finite_is_written(tmp_path):
    for bad in (torch.tensor([1.0, NAN]), torch.tensor([INF]).half(), torch.tensor([NAN]).to(torch.float8_e4m3fn)):
        with pytest.raises(LillamaError, match=r"x\.safetensors: w: 1 of \d numbers is not finite"):
            tensorfile.write(tmp_path / "x.safetensors", [tensorfile.Entry.of("w", bad)])
