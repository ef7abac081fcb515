"""The embedded demo model as the transformers model that it was exported from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray
from peers.models import write_tokenizer_config
from transformers import AutoConfig, AutoModelForCausalLM

import fastgen
from fastgen import CausalLM
from fastgen.export.prove import check

PLACE = Path(fastgen.__file__).parent / "demo"
# Of the text that the model was trained on.
PROMPTS = ("The os module", "class Counter", "Return a new", "import")
NEW = 40
PRODUCTS = ("MatMul", "MatMulIntegerToFloat", "MatMulNBits")
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "4 beams, no pair of tokens twice": {
        "do_sample": False, "num_beams": 4, "no_repeat_ngram_size": 2, "num_return_sequences": 2,
    },
    "draws": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50},
}  # fmt: skip


def write(target: Path) -> None:
    """Write it: the weights of the graph, which are packed there, in their own places.

    Of a graph in 8 bits it is the model whose weights the codes are.

    Raises:
        AssertionError: it says something else than the demo does.
    """
    graph = onnx_ir.load(PLACE / "model.onnx").graph
    arrays = {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    config = AutoConfig.from_pretrained(PLACE)
    model = AutoModelForCausalLM.from_config(config).eval()
    heads, size = config.num_attention_heads, config.head_dim
    kept = config.num_key_value_heads * size
    named = {
        name.removeprefix("model."): array
        for name, array in arrays.items()
        if name.startswith("model.")
    }
    state = {name: array for name, array in named.items() if name in model.state_dict()}
    products = [matrix(node, arrays) for node in graph if node.op_type in PRODUCTS]
    state.setdefault("lm_head.weight", products[-1])
    state["model.embed_tokens.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        packed, out, wide, down = products[4 * layer : 4 * layer + 4]
        place = f"model.layers.{layer}"
        cuts = [heads * size, heads * size + kept]
        for name, part in zip("qkv", np.split(packed, cuts), strict=True):
            state[f"{place}.self_attn.{name}_proj.weight"] = part
        state[f"{place}.self_attn.o_proj.weight"] = out
        gate, up = np.split(wide, 2)
        state |= {f"{place}.mlp.gate_proj.weight": gate, f"{place}.mlp.up_proj.weight": up}
        state[f"{place}.mlp.down_proj.weight"] = down
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    exact = all(node.op_type not in PRODUCTS[1:] for node in graph)
    rows = [np.array(CausalLM(PLACE).tokenizer.encode(text), np.int64) for text in PROMPTS]
    found = check.compare(
        check.reference_logits(model, rows), check.exported_logits(CausalLM(PLACE).model, rows)
    )
    assert found.max_difference < (1e-4 if exact else 0.2) and found.kl < 1e-2, found
    model.save_pretrained(target)
    shutil.copy(PLACE / "tokenizer.json", target)
    end = model.config.eos_token_id
    write_tokenizer_config(target, CausalLM(PLACE).tokenizer.decode([end], False))


def matrix(node: onnx_ir.Node, arrays: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The matrix of a product, float32 [out, in]: stored so, or as codes and scales."""
    stored = [None if one is None else arrays.get(str(one.name)) for one in node.inputs]
    if node.op_type == "MatMul":
        held = stored[1]
        assert held is not None
        return np.ascontiguousarray(held.T)
    if node.op_type == "MatMulIntegerToFloat":
        codes, scales = stored[1], stored[3]
        assert codes is not None and scales is not None
        return np.ascontiguousarray((codes * scales).T.astype(np.float32))
    codes, scales = stored[1:3]
    assert codes is not None and scales is not None and node.attributes.get_int("bits") == 8
    blocks = (codes.astype(np.float32) - 128) * scales.reshape(*codes.shape[:2], 1)
    return blocks.reshape(len(codes), -1)


def compare(source: Path, directory: Path) -> list[str]:
    """The differences from transformers, on rows that are padded on the left."""
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    ours = CausalLM(directory)
    rows = [ours.tokenizer.encode(text) for text in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    wrong = []
    for name, settings in SETTINGS.items():
        torch.manual_seed(7)
        given = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 0, **settings}
        expected = theirs.generate(ids, **given)
        found = ours.generate(ids, seed=7, **given)
        if not torch.equal(torch.as_tensor(found), expected):
            wrong.append(name)
    return wrong
