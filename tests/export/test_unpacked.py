"""Checkpoints whose weights are quantised: the numbers that transformers makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from fake_hub import blocked
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import FP4_VALUES

from fastgen.errors import ModelError
from fastgen.export import UnsupportedModel, export
from fastgen.export.build import origin, unpacked, weights
from fastgen.export.source import quantised

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import shrink

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
       "modules_to_not_convert": ["lm_head"]}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def in_fours(tensors: Tensors) -> Tensors:
    """Matrices of experts as gpt-oss is published."""
    out = dict(tensors)
    for name in [one for one in tensors if one.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, rows = out.pop(name).shape
        places = (experts, rows, into // 32)
        out[f"{name}_blocks"] = torch.randint(0, 256, (*places, 16), dtype=torch.uint8)
        out[f"{name}_scales"] = torch.randint(118, 124, places, dtype=torch.uint8)
    return out


def in_eights(tensors: Tensors) -> Tensors:
    """Matrices of layers as Qwen publishes them, in blocks of 32 by 32."""
    out = dict(tensors)
    for name in [one for one in tensors if one.endswith("_proj.weight")]:
        high, wide = tensors[name].shape
        blocks = tensors[name].reshape(high // 32, 32, wide // 32, 32)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        out |= {name: codes.reshape(high, wide), f"{name}_scale_inv": scales}
    return out


def saved(
    model: PreTrainedModel, place: Path, pack: Callable[[Tensors], Tensors], said: dict[str, Any]
) -> Path:
    model.save_pretrained(place)
    torch.manual_seed(0)
    change(place, pack)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return place


def change(place: Path, how: Callable[[Tensors], Tensors]) -> None:
    path = place / "model.safetensors"
    safetensors.torch.save_file(how(safetensors.torch.load_file(path)), path, {"format": "pt"})


@pytest.fixture(params=["mxfp4", "fp8"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and what its config.json says of it."""
    if request.param == "mxfp4":
        model = shrink.build("gpt_oss")
        return saved(model, tmp_path / "little", in_fours, MXFP4), MXFP4
    return saved(tiny.build("qwen3"), tmp_path / "little", in_eights, FP8), FP8


def test_the_numbers_of_a_byte() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(unpacked.EIGHTS, byte.view(torch.float8_e4m3fn).float().numpy())
    powers = byte.view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(unpacked.POWERS, powers)
    halves = np.array(FP4_VALUES, np.float32)
    pairs = np.stack([halves[byte & 15], halves[byte >> 4]], axis=1)
    np.testing.assert_array_equal(unpacked.PAIRS.view(np.float32).reshape(256, 2), pairs)


def test_tensors_are_transformers_to_the_bit(packed: tuple[Path, dict[str, Any]]) -> None:
    """Under its names and in its shapes, whichever rows are read."""
    place, said = packed
    found = unpacked.of_directory(place, said)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    theirs = {name: one.numpy() for name, one in model.state_dict().items()}
    assert found.keys() == theirs.keys()
    assert {type(one) for one in found.values()} & {unpacked.Mxfp4, unpacked.Scaled}
    for name, one in found.items():
        assert one.shape == theirs[name].shape
        np.testing.assert_array_equal(weights.whole(one), theirs[name])
        np.testing.assert_array_equal(one.read(slice(1, 3)), theirs[name][1:3])


def test_they_become_text_without_torch(
    packed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """A directory says nothing of how its checkpoint was quantised: it is not."""
    place, _ = packed
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    ids = list(range(5, 30))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].numpy()
    code = (
        blocked("torch", "transformers", "safetensors")
        + """
import sys, numpy, fastgen
from fastgen.export import export
made = fastgen.load(export(sys.argv[1], sys.argv[2], precision="fp32", progress=None))
out = made.generate([list(range(5, 30))], max_new_tokens=1, output_logits=True,
                    return_dict_in_generate=True)
numpy.save(sys.argv[2] + "/logits.npy", out.logits[0][0])
"""
    )
    subprocess.run([sys.executable, "-c", code, place, tmp_path / "made"], check=True)
    found = np.load(tmp_path / "made" / "logits.npy")
    np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(logits).max())
    assert "quant" not in (tmp_path / "made" / "config.json").read_text()
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["proof"].startswith("family ")


def test_where_torch_is_the_original_proves_them(
    packed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for build in (None, False):  # built, traced
        out = tmp_path / f"{build}"
        export(packed[0], out, precision="fp32", progress=None, build=build)
        report = json.loads((out / "report.json").read_text())
        assert report["proof"].startswith("the original ran")
        assert report["logits"]["max_difference"] < 1e-5
        assert "quant" not in (out / "config.json").read_text()


def test_a_mixture_is_read_an_expert_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved(shrink.build("gpt_oss"), tmp_path / "little", in_fours, MXFP4)
    read, whole = [], unpacked.Mxfp4.read

    def watched(self: unpacked.Mxfp4, rows: slice) -> Any:
        read.append(rows)
        return whole(self, rows)

    monkeypatch.setattr(unpacked.Mxfp4, "read", watched)
    monkeypatch.setattr("fastgen.export.quantize.parts.PART", 64)
    made = origin.Built(origin.of_directory(place)).convert()[0]
    assert not read
    name = "model.layers.0.mlp.experts.down_proj.experts"
    found = made.graph.initializers[name].const_value.numpy()
    assert [(rows.start, rows.stop) for rows in sorted(read, key=lambda one: one.start)] == [
        (at, at + 1) for at in range(len(found))
    ]
    theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict()
    whole_matrix = theirs[name.removesuffix(".experts")].transpose(1, 2).numpy()
    np.testing.assert_array_equal(found, whole_matrix)


@pytest.mark.parametrize("block", [(32, 16), (64, 64), (7, 5), (128, 128), None])
def test_blocks_need_not_divide_a_matrix(block: tuple[int, int] | None, tmp_path: Path) -> None:
    codes = torch.randn(50, 33).to(torch.float8_e4m3fn)
    height, width = block or codes.shape
    grid = -(-50 // height), -(-33 // width)
    scales = torch.rand(grid) if block else torch.rand(())
    safetensors.torch.save_file(
        {"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors"
    )
    said: dict[str, Any] = {"quant_method": "fp8"}
    if block != (128, 128):  # as where nothing is said
        said["weight_block_size"] = block and list(block)
    (found,) = unpacked.of_directory(tmp_path, said).values()
    rows, columns = np.arange(50)[:, None] // height, np.arange(33) // width
    expected = codes.float().numpy() * scales.reshape(grid).numpy()[rows, columns]
    np.testing.assert_array_equal(weights.whole(found), expected)
    np.testing.assert_array_equal(found.read(slice(31, 47)), expected[31:47])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        *[({"quant_method": name}, rf"quantised already \({name}\)")
          for name in ("gptq", "awq", "bitsandbytes", "compressed-tensors")],
        ({"bits": 4}, r"quantised already \(an unknown method\)"),
        (FP8 | {"activation_scheme": "static"}, "not read .activation_scheme = static"),
        (FP8 | {"scale_fmt": "ue8m0"}, "not read .scale_fmt = ue8m0"),
        (MXFP4 | {"turned": True}, "not read .turned = True"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_by_name(
    said: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to do; torch would not help, so nobody is told to install it."""
    place = saved(tiny.build("llama"), tmp_path / "little", dict, said)
    asked: list[dict[str, Any]] = [{}, {"build": True}, {"build": False}]
    for has_torch in (True, False):
        monkeypatch.setattr("fastgen.store.resolve.has_torch", lambda there=has_torch: there)
        for given in asked if has_torch else asked[:2]:
            with pytest.raises(
                UnsupportedModel, match=f"{words}.*export the model that it"
            ) as told:
                export(place, tmp_path / "out", progress=None, **given)
            assert "cannot be exported: its weights" in str(told.value)
            assert "install" not in str(told.value)


@pytest.mark.parametrize(
    ("said", "changes", "words"),
    [
        (MXFP4, lambda t: t.pop("a_scales"), "lacks a_scales"),
        (MXFP4, lambda t: t.update(a_scales=t["a_scales"][:, :1].contiguous()),
         r"a_scales is \[2, 1, 2\] where a_blocks is \[2, 3, 2, 16\]"),
        (FP8, lambda t: t.pop("a_scale_inv"), "lacks a_scale_inv"),
        (FP8, lambda t: t.update(a_scale_inv=torch.ones(1, 2)),
         r"a_scale_inv is \[1, 2\] where a is \[64, 64\]"),
        (FP8 | {"weight_block_size": [0, 32]}, lambda t: None, "weight_block_size = .0, 32."),
        (FP8 | {"weight_block_size": 32}, lambda t: None, "weight_block_size = 32"),
        (FP8, lambda t: t.update(a=t["a"].reshape(2, 32, 64)), "a is quantised in 3 dimensions"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_told(
    said: dict[str, Any], changes: Callable[[Tensors], object], words: str, tmp_path: Path
) -> None:
    tensors: Tensors = {
        "a_blocks": torch.zeros(2, 3, 2, 16, dtype=torch.uint8),
        "a_scales": torch.zeros(2, 3, 2, dtype=torch.uint8),
    }
    if said["quant_method"] == quantised.FP8:
        codes = torch.zeros(64, 64).to(torch.float8_e4m3fn)
        tensors = {"a": codes, "a_scale_inv": torch.ones(2, 2)}
    changes(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises((ModelError, UnsupportedModel), match=words):
        unpacked.of_directory(tmp_path, said)


def test_masks_in_bytes_mean_nothing(tmp_path: Path) -> None:
    place = saved(shrink.build("gpt_oss"), tmp_path / "little", in_fours, MXFP4)
    before = unpacked.of_directory(place, MXFP4).keys()
    change(place, lambda tensors: tensors | {"mask": torch.ones(3, dtype=torch.uint8)})
    assert unpacked.of_directory(place, MXFP4).keys() == before
