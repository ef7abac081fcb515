"""Mixtures of experts: what transformers says, what the kernels compute, and 8 and 4 bits."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig, AutoModelForCausalLM

import fastgen
from fastgen.export import UnsupportedModel, export
from fastgen.export.quantize import calibrate
from fastgen.export.quantize.kernels import (
    Kernel,
    block_codes,
    block_scales,
    codes_values,
    products,
)
from fastgen.export.rewrite import edit, mixture, trim
from fastgen.export.source.origin import Tolerance
from fastgen.export.trace import experts, graph

NEW = 8
LOOSE = Tolerance(max_difference=1.0, kl=0.2, top1=0.5, greedy=False)

_SOME = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "n_group": 2, "topk_group": 1, "n_shared_experts": 1}  # fmt: skip

# Softmax before and after the choice, sigmoids with a correction and groups, experts that every
# token goes to, a clamped gate with biases, and weights that do not add up to one.
MIXTURES = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_SOME, "shared_expert_intermediate_size": 96, "decoder_sparse_step": 1},
    "qwen3_moe": {**_SOME, "head_dim": 16, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {**_LOCAL, "head_dim": 16, "sliding_window": 8},
    "granitemoe": _LOCAL,
    "phimoe": _LOCAL,
    "glm4_moe": {**_GROUPS, "head_dim": 16, "first_k_dense_replace": 1},
    "minimax_m2": {**_LOCAL, "head_dim": 16, "rotary_dim": 8},
    "dots1": {
        **_GROUPS,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 2.5,
        "num_hidden_layers": 1,
    },
}


FORMS = ("gelu", "gelu_pytorch_tanh", "relu")  # the first also in `a_loop_of_experts_in_codes`


def nodes(model: fastgen.CausalLM) -> list[str]:
    return [node.op_type for node in onnx.load(model.directory / "model.onnx").graph.node]


@pytest.mark.parametrize("kind", tiny.some(MIXTURES, ("qwen2_moe", "gpt_oss", "dots1")))
def test_logits_and_tokens_are_those_of_transformers(pair, kind):
    """Ragged rows in one batch beside each row of transformers' alone; one node a layer."""
    theirs, ours = pair(kind, **MIXTURES[kind])
    random = np.random.default_rng(1)
    rows = [random.integers(3, tiny.VOCAB, length).tolist() for length in (3, 11, 18)]
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
                "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    found = ours.generate(rows, **settings)
    for i, row in enumerate(rows):
        expected = theirs.generate(torch.tensor([row]), **settings)
        for a, b in zip(expected.logits, found.logits, strict=True):
            assert np.abs(a[0].numpy() - b[i]).max() <= 2e-5 * float(a.abs().max())
        assert found.sequences[i][-NEW:] == expected.sequences[0, -NEW:].tolist()
    mixed = sum(hasattr(module, "_is_expert_parallel") for module in theirs.modules())
    assert mixed and nodes(ours).count("MoE") == mixed and "Loop" not in nodes(ours)


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_beams_are_those_of_transformers(pair, kind):
    theirs, ours = pair(kind, **MIXTURES[kind])
    row = np.random.default_rng(2).integers(3, tiny.VOCAB, (1, 9))
    settings = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2,
                "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    expected = theirs.generate(torch.from_numpy(row), **settings)
    assert ours.generate(row.tolist(), **settings) == expected.tolist()


def test_experts_in_three_flat_matrices(tmp_path):
    """dbrx loops over them by itself."""
    torch.manual_seed(0)
    part = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}
    changes = {"d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 128, "ffn_config": part,
               "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}}  # fmt: skip
    config = AutoConfig.for_model("dbrx", vocab_size=tiny.VOCAB, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.12 * torch.randn_like(parameter))
    path = export(model, tmp_path / "out", precision="fp32", progress=None)
    report = json.loads((path / "report.json").read_text())
    assert not report["mismatch"] and report["logits"]["max_difference"] < 2e-5
    assert nodes(fastgen.load(path)).count("MoE") == 1


@pytest.mark.parametrize("form", tiny.some([*FORMS, "tanh"], ["tanh"]))
def test_a_gate_that_the_kernel_lacks(form, tmp_path, converted_anew):
    """A loop over the experts; what that lacks, too, gathers each token's matrices."""
    model = tiny.build("mixtral", **MIXTURES["mixtral"], hidden_act=form, num_hidden_layers=1)
    path = export(model, tmp_path / "out", precision="fp32", progress=None)
    report = json.loads((path / "report.json").read_text())
    assert not report["mismatch"] and report["logits"]["max_difference"] < 2e-5
    found = nodes(fastgen.load(path))
    assert found.count("Loop") == (form != "tanh") and "MoE" not in found


def test_a_loop_of_experts_in_codes(tmp_path):
    """8 bits a code in both precisions: one layer of a loop with a gate, without doubt routed."""
    model = tiny.build("mixtral", **MIXTURES["mixtral"], hidden_act="gelu", num_hidden_layers=1)
    path = export(
        model,
        tmp_path / "out",
        tokenizer=tiny.tokenizer(),
        precision="int8",
        progress=None,
        tolerance=LOOSE,
    )
    report = json.loads((path / "report.json").read_text())
    made = [one for one in report["matrices"] if "experts" in one["name"]]
    assert [one["kernel"] for one in made] == ["int8 per channel"] * 2
    assert all(0 < one["error"] < 0.02 for one in made) and report["quality"]["kl"] < 0.02
    assert report["fp32"]["logits"]["max_difference"] < 2e-5
    kept = {one.name: one for one in onnx.load(path / "model.onnx").graph.initializer}
    codes = [one for name, one in kept.items() if "experts" in name and len(one.dims) == 3]
    assert {one.data_type for one in codes} == {TensorProto.INT8}
    for shares in report["time"].values():  # of what is in the loop, once
        assert "DequantizeLinear" in shares and "Loop" not in shares


def test_a_graph_without_experts_is_left_alone():
    model = tiny.build("llama", num_hidden_layers=1)
    converted = graph.convert(model, graph.kept_by(model))
    before = [(node.op_type, node.inputs, node.outputs) for node in converted.graph]
    mixture.lay_out(converted)
    assert before == [(node.op_type, node.inputs, node.outputs) for node in converted.graph]
    assert not edit.routers(converted.graph) and not mixture.mixtures(converted.graph)
    trim.trim(converted, 128)
    assert [one.is_head for one in products(converted.graph)] == [False] * 4 + [True]


def test_which_gate_a_module_has_is_found_by_trying():
    def found(kind, **changes):
        model = tiny.build(kind, **MIXTURES[kind], **changes)
        one = next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))
        return experts.activation_of(one)

    silu = mixture.Gate(1.0, 0.0, None).attributes()
    assert found("mixtral") == silu and "swiglu_limit" not in silu
    assert found("gpt_oss") == mixture.Gate(1.702, 1.0, 7.0).attributes()
    looped = {"activation_type": "gelu_tanh", "swiglu_fusion": 2}
    assert found("mixtral", hidden_act="gelu_pytorch_tanh") == looped
    assert found("mixtral", hidden_act="tanh") is None


def test_a_model_is_left_as_it_was(pair):
    theirs, _ = pair("qwen2_moe", **MIXTURES["qwen2_moe"])
    assert not any("forward" in vars(module) for module in theirs.modules())


def test_negative_weights_are_refused(tmp_path):
    model = tiny.build("mixtral", **MIXTURES["mixtral"])
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _, args, out: (out[0], -out[1], out[2]))
    with pytest.raises(UnsupportedModel, match=r"mixtral .* negative weight"):
        export(model, tmp_path / "out", progress=None)


# The kernels

TOKENS, HIDDEN, INNER, EXPERTS, CHOSEN = 7, 128, 256, 8, 3
GATE = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
        "activation_beta": 0.0, "k": CHOSEN}  # fmt: skip


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = normal(0, TOKENS, HIDDEN)
FIRST = 0.2 * normal(1, EXPERTS, 2 * INNER, HIDDEN)
SECOND = 0.2 * normal(2, EXPERTS, HIDDEN, INNER)


@pytest.fixture
def random() -> np.random.Generator:
    """Each test draws the same numbers, whichever tests run before it."""
    return np.random.default_rng(0)


@pytest.fixture
def routed(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Weights [tokens, experts] of CHOSEN experts each, not adding up to one, and their logits."""
    weights = np.zeros((TOKENS, EXPERTS), np.float32)
    for row in weights:
        row[random.permutation(EXPERTS)[:CHOSEN]] = random.uniform(0.01, 3, CHOSEN)
    weights[0, weights[0].argmax()] = mixture.LEAST
    logits = np.where(weights > 0, np.log(np.maximum(weights, mixture.LEAST)), mixture.NEVER)
    return weights, logits.astype(np.float32)


def summed(weights, first, second, seen=lambda x: x):
    """The sum over experts in numpy; `seen` is what becomes of each product's input."""
    out = np.zeros_like(X)
    for expert in range(EXPERTS):
        both = seen(X) @ first[expert].T
        gate, up = both[:, 0::2], both[:, 1::2]
        inner = gate / (1 + np.exp(-gate)) * up
        out += weights[:, expert : expert + 1] * (seen(inner) @ second[expert].T)
    return out


def run(kind: str, logits, constants: dict[str, np.ndarray], order: list[str], **more):
    node = helper.make_node(kind, order, ["y"], domain="com.microsoft", **GATE, **more)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in (("x", X), ("p", logits))
    ]
    made = helper.make_graph(
        [node],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": X, "p": logits})[0]


def test_logarithms_express_any_weights(routed):
    weights, logits = routed
    found = run("MoE", logits, {"a": FIRST, "b": SECOND}, ["x", "p", "a", "", "b"])
    expected = summed(weights, FIRST, SECOND)
    found = found * weights.sum(axis=1, keepdims=True)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "kernel, level, activations",
    [(Kernel(8), 0, 0), (Kernel(4), 0, 0), (Kernel(4, 32), 0, 0), (Kernel(4, 32), 4, 8),
     (Kernel(8, 128), 0, 8), (Kernel(8, 128), 4, 8), (Kernel(8, 32), 0, 8), (Kernel(8, 16), 0, 8)],
)  # fmt: skip
def test_codes_are_computed_as_they_are_understood(kernel, level, activations, routed):
    """8 bits in blocks quantise their input whatever is asked; 4 bits where it is asked for.

    Against the same codes with exact inputs that is a per cent: no error, but what the recipe
    must know. If one of these changes, `experts` has better or worse forms to choose from.
    """
    weights, logits = routed
    arrays, exact = {}, []
    for name, matrices in (("a", FIRST), ("b", SECOND)):
        whole = Kernel(kernel.bits, kernel.block or matrices.shape[2])
        scales = np.stack([block_scales(one.T, whole) for one in matrices])
        codes = [block_codes(m.T, whole, s) for m, s in zip(matrices, scales, strict=True)]
        values = [
            codes_values(c, whole, s, matrices.shape[2]) for c, s in zip(codes, scales, strict=True)
        ]
        exact.append(np.stack(values).swapaxes(1, 2))
        arrays[name] = np.stack(codes).reshape(*matrices.shape[:2], -1)
        arrays[f"{name}.scales"] = scales if kernel.block else scales[..., 0]
    more = {"expert_weight_bits": kernel.bits}
    more |= {"block_size": kernel.block, "accuracy_level": level} if kernel.block else {}
    order = ["x", "p", "a", "a.scales", "", "b", "b.scales"]
    found = run("QMoE", logits, arrays, order, **more) * weights.sum(axis=1, keepdims=True)
    plain = summed(weights, *exact)
    rounded = summed(weights, *exact, lambda x: calibrate.quantized_input(x, kernel))
    scale = np.abs(plain).max()
    wrong = np.abs(found - (rounded if activations else plain)) / scale
    assert np.median(wrong) <= 1e-6 and wrong.max() <= (5e-4 if activations else 2e-6)
    if activations:  # (which may round one number the other way)
        assert 0.003 * scale < np.abs(found - plain).max() < 0.03 * scale


# 8 and 4 bits


CASES = {"int8": "qwen2_moe", "int4": "gpt_oss"}


def outliers(model) -> list[torch.nn.Parameter]:
    """Let some channels of the last norm before experts reach far, with all that reads them."""
    norms = []
    for layer in model.model.layers[-1:]:
        mlp, norm = layer.mlp, layer.post_attention_layernorm.weight
        norms.append(norm)
        norm[:4] *= 60
        mlp.experts.gate_up_proj[..., :4] /= 60
        for linear in (
            mlp.gate,
            mlp.shared_expert_gate,
            mlp.shared_expert.gate_proj,
            mlp.shared_expert.up_proj,
        ):
            linear.weight[:, :4] /= 60
    return norms


@pytest.fixture(scope="module", params=CASES)
def quantized(request, tmp_path_factory):
    """A mixture and its export in that precision: int8 with outliers, int4 with an idle expert."""
    kind = CASES[request.param]
    model = tiny.build(kind, **MIXTURES[kind])
    with torch.no_grad():
        if kind == "qwen2_moe":
            outliers(model)
        else:
            for layer in model.model.layers:
                layer.mlp.router.bias[-1] = -1e3
    path = tmp_path_factory.mktemp("experts") / request.param
    export(
        model,
        path,
        tokenizer=tiny.tokenizer(),
        precision=request.param,
        progress=None,
        tolerance=LOOSE,
    )
    return request.param, model, fastgen.load(path)


def report_of(model: fastgen.CausalLM) -> dict:
    return json.loads((model.directory / "report.json").read_text())


def test_the_codes_cost_little(quantized):
    precision, _, model = quantized
    report = report_of(model)
    assert report["fp32"]["logits"]["max_difference"] < 2e-5
    assert report["quality"]["kl"] < {"int8": 0.03, "int4": 0.15}[precision]
    assert nodes(model).count("QMoE") == 2 and "MoE" not in nodes(model)
    assert "QMoE" in report["time"]["prefill"] and "QMoE" in report["time"]["decode"]


def test_the_report_names_experts_that_no_text_came_to(quantized):
    precision, _, model = quantized
    report = report_of(model)
    made = [one for one in report["matrices"] if "experts" in one["name"]]
    # In 8 bits the second layer has inputs with outliers: they are not quantised.
    second = {"int8": "int8 per channel", "int4": "int4, blocks of 32"}[precision]
    kernels = [f"{precision}, blocks of 32"] * 2 + [second] * 2
    assert [one["kernel"] for one in made] == kernels
    bound = {"int8": 0.1, "int4": 0.15}[precision]
    assert all(0 < one["error"] < bound for one in made)
    idle = {"int8": [], "int4": [3]}[precision]
    assert [(one["experts"], one["unreached"]) for one in report["experts"]] == [(4, idle)] * 2


def test_routers_stay_in_float32_and_what_feeds_experts_is_not_smoothed(quantized):
    precision, _, model = quantized
    found = onnx.load(model.directory / "model.onnx").graph
    kept = {one.name: one for one in found.initializer}
    floats = [node for node in found.node if node.op_type == "MatMul" and node.input[1] in kept]
    assert [list(kept[node.input[1]].dims) for node in floats] == [[64, 4]] * 2
    if precision == "int8":
        readers = [name for name in report_of(model)["smoothed"] if "gate" in name]
        assert not readers
        norms = {name for name in kept if "post_attention_layernorm" in name}
        assert norms and not any("smooth" in name for name in norms)


def test_a_row_does_not_feel_its_neighbours(quantized, random):
    precision, _, model = quantized
    ids = random.integers(3, tiny.VOCAB, (8, 9))

    def logits(rows):
        cache = model.model.new_cache(len(rows), 32)
        first = model.model.forward(list(rows), cache)[:, 0].copy()
        return np.stack([first, model.model.forward([row[:1] for row in rows], cache)[:, 0]])

    together = logits(ids)
    alone = np.concatenate([logits(row[None]) for row in ids], axis=1)
    share = {"int8": 1e-6, "int4": 0.05}[precision]  # MatMulNBits' activations, see test_quantize
    assert np.abs(alone - together).max() <= share * np.abs(together).max()


def test_a_directory_in_codes_is_smaller(quantized):
    precision, reference, model = quantized
    size = (model.directory / "model.onnx.data").stat().st_size
    weights = sum(p.numel() for p in reference.parameters())
    embedding = 4 * reference.get_input_embeddings().weight.numel()
    bits = {"int8": 8, "int4": 4}[precision]
    assert size < embedding + weights * bits / 8 * 1.4 + 128 * 16 * 4 + 20_000
