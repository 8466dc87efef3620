"""Damaged and contradictory checkpoints: one message that names the file, never a traceback or a wrong model."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lillama
from lillama import LillamaError
from lillama.base.tensorfile import TensorFile
from lillama.checkpoint import seal
from lillama.cli import main as cli
from lillama.pretrained.locate import read_processor, read_tokenizer
from lillama.recipe.schema import Model

GOLDEN = Path(__file__).parent.parent / "golden"
Q = "model.layers.0.self_attn.q_proj"


def copy_of(name: str, target: Path) -> Path:
    shutil.copytree(GOLDEN / name / "model", target / "model")
    return target / "model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copy_of("linear-pivoted", tmp_path)


def change(directory: Path, change: Any, file: str = "config.json") -> None:
    """Have `change` alter what a JSON file holds."""
    held = json.loads((directory / file).read_text())
    change(held)
    (directory / file).write_text(json.dumps(held))


def refused(directory: Path, *said: str, **options: Any) -> None:
    with pytest.raises(LillamaError) as caught:
        lillama.load(directory, **options)
    for text in said:
        assert text in str(caught.value)


def test_a_sealed_checkpoint_knows_every_byte(checkpoint: Path) -> None:
    assert seal.damaged(checkpoint) is None
    refused(checkpoint, "cannot be verified", verify=True)
    seal.seal(checkpoint)
    assert seal.damaged(checkpoint) == []
    lillama.load(checkpoint, verify=True)
    said = (checkpoint / seal.NAME).read_text()
    for text in (said[:-1], f" {said}", said.replace('"files"', '"more": 1, "files"'), said.replace("1", "2", 1)):
        (checkpoint / seal.NAME).write_text(text)
        refused(checkpoint, seal.NAME, verify=True)
    (checkpoint / seal.NAME).write_text(said)
    for file in sorted(checkpoint.iterdir()):
        if file.name == seal.NAME:
            continue
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            refused(checkpoint, f"{file.name}: other content", verify=True)
        file.write_bytes(whole[:-1])
        refused(checkpoint, f"{file.name}: {len(whole) - 1:,} bytes, not {len(whole):,}", verify=True)
        file.unlink()
        refused(checkpoint, f"{file.name}: missing" if file.name != "config.json" else "no config.json", verify=True)
        file.write_bytes(whole)
    (checkpoint / "chat_template.jinja").write_text("mine")
    refused(checkpoint, "chat_template.jinja: is not in the manifest", verify=True)


def test_weights_that_were_cut_short_are_seen_without_hashing(checkpoint: Path) -> None:
    seal.seal(checkpoint)
    change(checkpoint, lambda held: held.update(use_cache=False))  # what people change on purpose
    lillama.load(checkpoint)
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(checkpoint, "model.safetensors: ", "remove lillama.manifest.json")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_a_manifest_names_nothing_outside(checkpoint: Path, name: str) -> None:
    seal.seal(checkpoint)
    change(checkpoint, lambda held: held["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}), seal.NAME)
    assert seal.damaged(checkpoint) == [f"{seal.NAME}: the manifest itself is damaged"]
    refused(checkpoint, "the manifest itself is damaged", verify=True)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1}', '{"version": 2, "files": {}}', "[" * 9999])
def test_a_damaged_manifest_is_one(checkpoint: Path, text: str) -> None:
    (checkpoint / seal.NAME).write_text(text)
    assert seal.damaged(checkpoint) == [f"{seal.NAME}: the manifest itself is damaged"]
    lillama.load(checkpoint)


def tensors(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(first: Any = 0, last: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 16, [3])}, "begins at byte 4"),
        ({"a": entry(0, 4, [1])}, "end at byte"),
        ({"a": entry(0, 400, [100])}, "end at byte"),
        ({"a": entry(0, 16, [5])}, "has 16 bytes"),
        ({"a": entry(-16, 0)}, "shape or place"),
        ({"a": entry(0, 16, [-2, -2])}, "shape or place"),
        ({"a": entry(0, 16, [True, 4])}, "shape or place"),
        ({"a": entry(0, 16, [2.0, 2])}, "shape or place"),
        ({"a": entry(0, 16, 4)}, "damaged"),
        ({"a": entry(0, 16, [4], "F31")}, "unknown type"),
        ({"a": entry(0, 16, [4], ["F32"])}, "damaged"),
        ({"a": entry(0, 0, [0, 10**18, 10**18])}, "has 0 bytes"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "no 'data_offsets'"),
        ({"a": 3}, "damaged"),
        ([], "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}", "twice"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_header_that_cannot_be_is_refused_before_anything_is_read(tmp_path: Path, header: Any, said: str) -> None:
    with pytest.raises(LillamaError, match=r"no safetensors file, or a damaged one") as caught:
        TensorFile(tensors(tmp_path / "x.safetensors", header))
    assert said in str(caught.value)


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path: Path) -> None:
    for length in (1 << 62, 99_999_999, 200):
        with pytest.raises(LillamaError, match="header would be"):
            TensorFile(tensors(tmp_path / "x.safetensors", {"a": entry()}, length=length))
    (tmp_path / "x.safetensors").write_bytes(b"\1\2")
    with pytest.raises(LillamaError, match="damaged"):
        TensorFile(tmp_path / "x.safetensors")
    whole = TensorFile(tensors(tmp_path / "x.safetensors", {"a": entry(0, 8, [2]), "b": entry(8, 16, [2])}))
    assert whole.read("b").tolist() == [0.0, 0.0]


def _module(**changes: Any) -> Any:
    return lambda held: held["quantization_config"]["modules"][Q].update(changes)


def _set(key: str, value: Any) -> Any:
    return lambda held: held.update({key: value})


def _quantisation(key: str, value: Any) -> Any:
    return lambda held: held["quantization_config"].update({key: value})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_module(rank=0), "'rank' is 0"),
        (_module(rank=-1), "'rank' is -1"),
        (_module(rank="8"), "'rank' is '8'"),
        (_module(rank=True), "'rank' is True"),
        (_module(rank=10**12), "has no rank 1000000000000"),
        (_module(kind="embedding"), Q),
        (_module(kind="experts"), "no such projection"),
        (_module(kind=[]), "'kind' is []"),
        (_module(storage="nothing"), "nothing"),
        (_module(storage=7), "'storage' is 7"),
        (_module(tied="model.embed_tokens"), "tied to 'model.embed_tokens'"),
        (_module(tied=["x"]), "tied to ['x']"),
        (lambda held: held["quantization_config"]["modules"].update({"model.nowhere": {}}), "model.nowhere"),
        (
            lambda held: held["quantization_config"]["modules"].update(
                {"model.nowhere": {"kind": "linear", "storage": "factors", "rank": 2}}
            ),
            "model.nowhere",
        ),
        (_quantisation("modules", []), "not an object"),
        (_quantisation("modules", {Q: 3}), "described by a int"),
        (_quantisation("version", "1"), "'1'"),
        (_quantisation("version", [1]), "[1]"),
        (_quantisation("version", 0), "0"),
        (_quantisation("shared", "x"), "not a list of names"),
        (_quantisation("shared", [["model.nowhere", "model.norm"]]), "model.nowhere"),
        (_quantisation("shared", [["model", "model.norm"]]), "one inside another"),
        (_quantisation("shared", [[1]]), "not a list of names"),
        (_quantisation("quant_method", "awq"), "quantised by 'awq'"),
        (_set("quantization_config", []), "quantization_config"),
        (_set("architectures", ["pipeline"]), "no model class 'pipeline'"),
        (_set("architectures", ["logging"]), "no model class 'logging'"),
        (_set("architectures", "LlamaForCausalLM"), "architectures"),
        (_set("architectures", []), "no model class 'None'"),
        (_set("auto_map", [1]), "auto_map"),
        (_set("hidden_size", 10**12), "more than any model has"),
        (_set("hidden_size", 10**400), "more than any model has"),
        (_set("hidden_size", 0), "hidden_size"),
        (_set("hidden_size", "64"), "hidden_size"),
        (_set("hidden_size", 48), ""),
        (_set("num_attention_heads", 0), "num_attention_heads"),
        (_set("num_key_value_heads", -2), "num_key_value_heads"),
        (_set("num_hidden_layers", 0), "num_hidden_layers"),
        (_set("num_hidden_layers", 10**9), "more than any model has"),
        (_set("num_labels", 10**9), "more than any model has"),
        (_set("vocab_size", 100_000_000), "numbers, the files hold"),
        (_set("vocab_size", 54), ""),
        (_set("rope_parameters", 3), ""),
        (_set("dtype", "float13"), ""),
        (_set("hidden_act", "eval"), ""),
        (_set("attn_implementation", "someone/kernel"), "someone/kernel"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_a_line(checkpoint: Path, harm: Any, said: str) -> None:
    change(checkpoint, harm)
    refused(checkpoint, said)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"config"', "[" * 100_000])
def test_a_configuration_that_is_no_object(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, "config.json")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ([], "not an object"),
        ({}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ({"weight_map": {"a": "../other.safetensors"}}, "'../other.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd'"),
        ({"weight_map": {"a": "config.json"}}, "'config.json'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"a": "part.safetensors"}}, "lacks 1 tensors that the index places here, such as a"),
    ],
)
def test_an_index_names_tensors_that_are_there_and_nothing_else(checkpoint: Path, index: Any, said: str) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent / "other.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(checkpoint, said)


def verb(*arguments: Any) -> int:
    return cli.main([str(one) for one in arguments])


def test_verify_names_what_is_damaged_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    assert verb("verify", run) == 0
    assert capsys.readouterr().out.count("\n") == 1
    names = sorted(json.loads((run / "MANIFEST.json").read_text())["files"])
    (run / names[0]).unlink()
    (run / names[1]).write_bytes((run / names[1]).read_bytes()[:-1] + b"\1")
    outside = tmp_path / "outside"
    shutil.copy(run / names[2], outside)
    (run / names[2]).unlink()
    (run / names[2]).symlink_to(outside)
    assert verb("verify", run) == 1
    said = capsys.readouterr().out
    assert f"{names[0]}: missing" in said and f"{names[1]}: other content" in said
    assert f"{names[2]}: is not a file in this directory" in said
    assert not any(name in said for name in names[3:])
    change(run, lambda held: held["files"].update({"../outside": "0" * 64}), "MANIFEST.json")
    assert verb("verify", run) == 2
    assert "it names '../outside'" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "", "null", "[" * 100_000])
def test_verify_of_a_damaged_manifest(tmp_path: Path, manifest: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "MANIFEST.json").write_text(manifest)
    assert verb("verify", tmp_path) == 2
    assert "the manifest is damaged" in capsys.readouterr().err


def test_verify_of_checkpoints(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("verify", checkpoint) == 0
    assert "no hash is known" in capsys.readouterr().out
    change(checkpoint, _set("intermediate_size", 40))
    assert verb("verify", checkpoint) == 1
    assert "model.safetensors: " in capsys.readouterr().out
    shutil.rmtree(checkpoint)
    copy_of("linear-pivoted", checkpoint.parent)
    seal.seal(checkpoint)
    assert verb("verify", checkpoint) == 0
    assert "all as they were written" in capsys.readouterr().out
    (checkpoint / "generation_config.json").unlink()
    assert verb("verify", checkpoint) == 1
    assert "generation_config.json: missing" in capsys.readouterr().out
    assert verb("verify", checkpoint.parent) == 2
    assert "neither a run directory nor a checkpoint" in capsys.readouterr().err


WITHOUT_TORCH = """
import sys
from lillama.cli.main import main
code = main(["verify", sys.argv[1]])
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""


def test_verify_needs_no_torch(checkpoint: Path) -> None:
    seal.seal(checkpoint)
    for place in (GOLDEN / "run", checkpoint):
        subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(place)], check=True)


@pytest.mark.parametrize("case", [path.parent.name for path in GOLDEN.glob("*/expected.safetensors")])
def test_verify_takes_every_kind_of_checkpoint_for_whole(case: str) -> None:
    assert verb("verify", GOLDEN / case / "model") == 0


def test_the_tokenizer_of_an_endless_configuration_is_not_waited_for(checkpoint: Path) -> None:
    change(checkpoint, _set("num_labels", 10**12))
    with pytest.raises(LillamaError, match="more than any model has"):
        read_processor(checkpoint)
    with pytest.raises(LillamaError, match="more than any model has"):
        read_tokenizer(Model.model_validate({"id": str(checkpoint)}), str(checkpoint), None, checkpoint / "none")
