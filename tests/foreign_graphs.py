"""ONNX folders as other tools make them, of the weights of a tiny Llama, operator by operator.

What the tools themselves write is tested with them (`bench/folders`); these are small, and one of
each signature.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tiny
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

LOWEST = float(np.finfo(np.float32).min)
MICROSOFT = "com.microsoft"
BLOCK = 32


@dataclass(frozen=True)
class Style:
    """The way in which a tool writes a graph.

    Attributes:
        attention: "grouped" (GroupQueryAttention) or "joined" (keys are concatenated).
        positions: "input", or "inside" where the node or the past's length gives them.
        rotary: of grouped attention: "inside" it, or "apart" in a node before it.
        packed: queries, keys and values are one product and one input.
        column: `seqlens_k` is [rows, 1].
        keep: an input `num_logits_to_keep`.
        half: in float16.
        linear: "plain", "q4" or "q8" (MatMulNBits), or "dynamic" (MatMulInteger).
        single: made for one token after a past: it sees all that is there.
        merged: one If, for whether there is a past.
        window: tokens that a query sees.
        cap: of the scores.
        slopes: ALiBi is added to the scores.
    """

    attention: str = "joined"
    positions: str = "input"
    rotary: str = "inside"
    packed: bool = False
    column: bool = False
    keep: bool = False
    half: bool = False
    linear: str = "plain"
    single: bool = False
    merged: bool = False
    window: int | None = None
    cap: float | None = None
    slopes: bool = False


STYLES = {
    "genai": Style("grouped", "inside", packed=True),
    "genai int4": Style("grouped", "inside", packed=True, linear="q4"),
    "genai int8": Style("grouped", "inside", packed=True, linear="q8"),
    "genai fp16": Style("grouped", "inside", half=True),
    "transformers.js": Style("grouped", rotary="apart", column=True, keep=True),
    "transformers.js q4f16": Style("grouped", rotary="apart", keep=True, half=True, linear="q4"),
    "optimum": Style(),
    "optimum fp16": Style(half=True),
    "optimum quantized": Style(linear="dynamic"),
    "optimum without positions": Style(positions="inside"),
    "optimum window": Style(window=8),
    "merged": Style(positions="inside", merged=True),
    "with past": Style(positions="inside", single=True),
}


class Writer:
    """Writes the graph of a Llama, node by node, in one style.

    Args:
        model: transformers' Llama.
    """

    def __init__(self, model: Any, style: Style) -> None:
        self.style, self.config = style, model.config
        self.weights = {n: p.detach().numpy() for n, p in model.state_dict().items()}
        self.kind = TensorProto.FLOAT16 if style.half else TensorProto.FLOAT
        self.numbers = np.float16 if style.half else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.held: dict[str, onnx.TensorProto] = {}
        self.count = itertools.count()
        self.heads = self.config.num_attention_heads
        self.kv = self.config.num_key_value_heads
        self.size = self.config.head_dim

    def __call__(
        self,
        kind: str,
        *inputs: str,
        outputs: int = 1,
        domain: str = "",
        out: str | None = None,
        **attributes: Any,
    ) -> Any:
        """A node; its output's name, or several."""
        number = next(self.count)
        names = [out] if out else [f"/{kind}_{number}_{i}" for i in range(outputs)]
        self.nodes.append(
            helper.make_node(kind, inputs, names, f"/{kind}_{number}", domain=domain, **attributes)
        )
        return names[0] if len(names) == 1 else names

    def of(self, array: Any, name: str | None = None) -> str:
        """An initializer."""
        array = np.asarray(array)
        if array.dtype in (np.float64, np.float32) and name != "scale.single":
            array = array.astype(self.numbers)
        name = name or f"const_{next(self.count)}"
        if name not in self.held:
            self.held[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *numbers: int) -> str:
        return self.of(np.array(numbers, np.int64))

    def size_of(self, value: str, axis: int) -> str:
        """A dimension, [1]."""
        return self("Gather", self("Shape", value), self.ints(axis), axis=0)

    def linear(self, x: str, *names: str) -> str:
        """x times one matrix, or several side by side."""
        matrix = np.concatenate([self.weights[f"{name}.weight"] for name in names])  # [out, in]
        name = "+".join(names)
        if self.style.linear in ("q4", "q8"):
            bits = int(self.style.linear[1])
            out, inside = matrix.shape
            blocks = matrix.reshape(out, inside // BLOCK, BLOCK)
            middle = 1 << bits - 1
            scale = np.abs(blocks).max(-1) / (middle - 1)
            whole = (np.rint(blocks / scale[..., None]) + middle).astype(np.uint8)
            packed = whole[..., 0::2] | whole[..., 1::2] << 4 if bits == 4 else whole
            return self(
                "MatMulNBits",
                x,
                self.of(packed, f"{name}.{self.style.linear}"),
                self.of(scale, f"{name}.scales"),
                domain=MICROSOFT,
                K=inside,
                N=out,
                bits=bits,
                block_size=BLOCK,
                accuracy_level=4,
            )
        if self.style.linear == "dynamic":
            scale = np.abs(matrix).max() / 127
            whole = np.rint(matrix.T / scale).astype(np.int8)
            some, factor, zero = self("DynamicQuantizeLinear", x, outputs=3)
            product = self(
                "MatMulInteger", some, self.of(whole, f"{name}.int8"), zero, self.of(np.int8(0))
            )
            factor = self("Mul", factor, self.of(scale))
            return self("Mul", self("Cast", product, to=TensorProto.FLOAT), factor)
        return self("MatMul", x, self.of(matrix.T.copy(), name))

    def norm(self, x: str, name: str) -> str:
        weight = self.of(self.weights[f"{name}.weight"], name)
        if self.style.attention == "grouped":
            return self(
                "SimplifiedLayerNormalization",
                x,
                weight,
                axis=-1,
                epsilon=self.config.rms_norm_eps,
                stash_type=1,
            )
        x = self("Cast", x, to=TensorProto.FLOAT)
        mean = self(
            "ReduceMean",
            self("Pow", x, self.of(np.float32(2), "scale.single")),
            self.ints(-1),
            keepdims=1,
        )
        with self.single():
            root = self("Sqrt", self("Add", mean, self.of(np.float32(self.config.rms_norm_eps))))
            x = self("Mul", x, self("Div", self.of(np.float32(1)), root))
        return self("Mul", weight, self("Cast", x, to=self.kind))

    @contextmanager
    def single(self) -> Iterator[None]:
        """Numbers in float32, whatever the graph is in."""
        before, self.numbers = self.numbers, np.float32
        yield
        self.numbers = before

    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin [positions, size / 2]."""
        theta = self.config.rope_parameters["rope_theta"]
        speeds = theta ** -(np.arange(0, self.size, 2) / self.size)
        angles = np.outer(np.arange(self.config.max_position_embeddings), speeds)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    # The two kinds of attention

    def grouped(self, layer: int, h: str) -> str:
        """GroupQueryAttention [rows, new, heads * size]."""
        names = [f"model.layers.{layer}.self_attn.{one}_proj" for one in "qkv"]
        if self.style.packed:
            query, *others = self.linear(h, *names), "", ""
        else:
            query, *others = (self.linear(h, name) for name in names)
        cos, sin = (self.of(t, n) for t, n in zip(self.tables(), ("cos", "sin"), strict=True))
        apart = self.style.rotary == "apart"
        if apart:
            query, others[0] = (
                self("RotaryEmbedding", x, "position_ids", cos, sin, domain=MICROSOFT)
                for x in (query, others[0])
            )
        told = {"local_window_size": self.style.window} if self.style.window else {}
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        out = f"/attention_{layer}_{next(self.count)}"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [query, *others, *past, self.seqlens, self.total, *([] if apart else [cos, sin])],
                [out, *(f"present.{layer}.{kind}" for kind in ("key", "value"))],
                f"/attention_{layer}",
                domain=MICROSOFT,
                num_heads=self.heads,
                kv_num_heads=self.kv,
                do_rotary=int(not apart),
                scale=self.size**-0.5,
                **told,
            )
        )
        return out

    def split(self, x: str, heads: int) -> str:
        """[rows, heads, new, size]"""
        parts = [self.rows, self.new, self.ints(heads), self.ints(self.size)]
        return self(
            "Transpose", self("Reshape", x, self("Concat", *parts, axis=0)), perm=[0, 2, 1, 3]
        )

    def turned(self, x: str) -> str:
        half, end = self.ints(self.size // 2), self.ints(1 << 31)
        first = self("Slice", x, self.ints(0), half, self.ints(3))
        second = self("Neg", self("Slice", x, half, end, self.ints(3)))
        other = self("Concat", second, first, axis=-1)
        return self("Add", self("Mul", x, self.cos), self("Mul", other, self.sin))

    def spread(self, x: str) -> str:
        """Keys and values for all heads."""
        total = self.size_of(x, 2)
        each = self.heads // self.kv
        five = self(
            "Concat", self.rows, self.ints(self.kv, each), total, self.ints(self.size), axis=0
        )
        x = self("Expand", self("Unsqueeze", x, self.ints(2)), five)
        four = self("Concat", self.rows, self.ints(self.heads), total, self.ints(self.size), axis=0)
        return self("Reshape", x, four)

    def joined(self, layer: int, h: str, past: bool) -> str:
        name = f"model.layers.{layer}.self_attn"
        query = self.turned(self.split(self.linear(h, f"{name}.q_proj"), self.heads))
        key = self.turned(self.split(self.linear(h, f"{name}.k_proj"), self.kv))
        value = self.split(self.linear(h, f"{name}.v_proj"), self.kv)
        kept = []
        for kind, new in (("key", key), ("value", value)):
            out = f"present.{layer}.{kind}" + self.suffix
            if past:
                self("Concat", f"past_key_values.{layer}.{kind}", new, axis=2, out=out)
            else:
                self("Identity", new, out=out)
            kept.append(out)
        keys = self("Transpose", self.spread(kept[0]), perm=[0, 1, 3, 2])
        scores = self("Mul", self("MatMul", query, keys), self.of(self.size**-0.5))
        if self.style.cap is not None:
            cap = self.of(self.style.cap)
            scores = self("Mul", self("Tanh", self("Div", scores, cap)), cap)
        if self.style.slopes:
            places = self("Cast", self.places, to=self.kind)
            slopes = self.of(2.0 ** -np.arange(1, 1 + self.heads).reshape(1, -1, 1, 1))
            scores = self("Add", scores, self("Mul", slopes, places))
        weights = self("Softmax", self("Add", scores, self.mask), axis=-1)
        found = self("Transpose", self("MatMul", weights, self.spread(kept[1])), perm=[0, 2, 1, 3])
        flat = self("Concat", self.rows, self.new, self.ints(self.heads * self.size), axis=0)
        return self("Reshape", found, flat)

    # What comes before the layers

    def lengths(self) -> None:
        """The inputs that other tools give GroupQueryAttention."""
        axis = self.ints(1)
        count = self("ReduceSum", "attention_mask", axis, keepdims=int(self.style.column))
        self.seqlens = self("Cast", self("Sub", count, self.ints(1)), to=TensorProto.INT32)
        total = self("Gather", self("Shape", "attention_mask"), self.of(np.int64(1)), axis=0)
        self.total = self("Cast", total, to=TensorProto.INT32)

    def angles_and_mask(self, past: bool) -> None:
        """The inputs of joined attention."""
        self.rows, self.new = self.size_of("input_ids", 0), self.size_of("input_ids", 1)
        total = self.size_of("past_key_values.0.key", 2) if past else self.ints(0)
        held, total = total, self("Add", total, self.new)
        start, end = (self("Squeeze", one) for one in (held, total))
        one, zero = self.of(np.int64(1)), self.of(np.int64(0))
        places = self("Range", start, end, one)
        asked = (
            "position_ids"
            if self.style.positions == "input"
            else self("Unsqueeze", places, self.ints(0))
        )
        with self.single():
            theta = self.config.rope_parameters["rope_theta"]
            speeds = theta ** -(np.arange(0, self.size, 2) / self.size)
            counted = self("Cast", self("Unsqueeze", asked, self.ints(2)), to=TensorProto.FLOAT)
            angles = self("MatMul", counted, self.of(speeds.reshape(1, 1, -1)))
        angles = self("Concat", angles, angles, axis=-1)
        self.cos, self.sin = (
            self("Unsqueeze", self("Cast", self(kind, angles), to=self.kind), self.ints(1))
            for kind in ("Cos", "Sin")
        )
        keys = self("Unsqueeze", self("Range", zero, end, one), self.ints(0))
        queries = self("Unsqueeze", places, self.ints(1))
        seen = self("LessOrEqual", keys, queries)
        if self.style.window is not None:
            beyond = self("Sub", queries, self.ints(self.style.window))
            seen = self("And", seen, self("Greater", keys, beyond))
        self.places = self("Sub", keys, queries)
        there = self("Cast", "attention_mask", to=TensorProto.BOOL)
        there = self("Unsqueeze", there, self.ints(1, 2))
        if self.style.single:
            seen = there
        else:
            seen = self("And", self("Unsqueeze", seen, self.ints(0, 1)), there)
        lowest = float(np.finfo(self.numbers).min)
        self.mask = self("Where", seen, self.of(0.0), self.of(lowest))

    def body(self, past: bool = True, suffix: str = "") -> str:
        """All layers and the logits."""
        self.suffix = suffix
        if self.style.attention == "grouped":
            self.lengths()
        else:
            self.angles_and_mask(past)
        x = self("Gather", self.of(self.weights["model.embed_tokens.weight"], "embed"), "input_ids")
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            h = self.norm(x, f"{name}.input_layernorm")
            if self.style.attention == "grouped":
                h = self.grouped(layer, h)
            else:
                h = self.joined(layer, h, past)
            x = self("Add", x, self.linear(h, f"{name}.self_attn.o_proj"))
            h = self.norm(x, f"{name}.post_attention_layernorm")
            gate = self.linear(h, f"{name}.mlp.gate_proj")
            gate = self("Mul", gate, self("Sigmoid", gate))
            h = self("Mul", gate, self.linear(h, f"{name}.mlp.up_proj"))
            x = self("Add", x, self.linear(h, f"{name}.mlp.down_proj"))
        x = self.norm(x, "model.norm")
        if self.style.keep:
            start = self("Unsqueeze", self("Neg", "num_logits_to_keep"), self.ints(0))
            x = self("Slice", x, start, self.ints(1 << 31), self.ints(1))
        return self("Identity", self.linear(x, "lm_head"), out="logits" + suffix)

    # The whole

    def inputs(self) -> dict[str, tuple[int, list[int | str]]]:
        given: dict[str, tuple[int, list[int | str]]] = {
            "input_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
            "attention_mask": (TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        }
        if self.style.positions == "input":
            given["position_ids"] = given["input_ids"]
        if self.style.keep:
            given["num_logits_to_keep"] = (TensorProto.INT64, [])
        past: list[int | str] = ["batch_size", self.kv, "past_sequence_length", self.size]
        for layer, kind in itertools.product(
            range(self.config.num_hidden_layers), ("key", "value")
        ):
            given[f"past_key_values.{layer}.{kind}"] = (self.kind, past)
        if self.style.merged:
            given["use_cache_branch"] = (TensorProto.BOOL, [1])
        return given

    def model(self) -> onnx.ModelProto:
        given = self.inputs()
        kept = {
            name.replace("past_key_values", "present"): (kind, [*dims[:2], "total", dims[3]])
            for name, (kind, dims) in given.items()
            if name.startswith("past")
        }
        kept = {"logits": (self.kind, ["batch_size", "sequence_length", tiny.VOCAB]), **kept}
        if self.style.merged:
            branches = {}
            for branch, past in (("then_branch", True), ("else_branch", False)):
                self.body(past, f".{branch}")
                outputs = [
                    helper.make_tensor_value_info(f"{name}.{branch}", kind, None)
                    for name, (kind, _) in kept.items()
                ]
                branches[branch] = helper.make_graph(self.nodes, branch, [], outputs)
                self.nodes = []
            self.nodes = [helper.make_node("If", ["use_cache_branch"], [*kept], "/If", **branches)]
        else:
            self.body()
        values = [
            [helper.make_tensor_value_info(name, *told) for name, told in one.items()]
            for one in (given, kept)
        ]
        graph = helper.make_graph(self.nodes, "main", *values, [*self.held.values()])
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write(
    model: Any, style: Style, place: Path, name: str = "onnx/model.onnx", external: str = ""
) -> Path:
    """A folder with a graph, beside those that are there; with config.json and a tokenizer.

    Args:
        external: how weights lie outside the graph: "" for inside; "one" file; "several", at
            offsets that are no multiple of anything.
    """
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Writer(model, style).model()
    if external:
        scatter(made, path, several=external == "several")
    onnx.save(made, path)
    if not (place / "config.json").exists():
        model.config.save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    return place


def scatter(made: onnx.ModelProto, path: Path, several: bool) -> None:
    """Weights go to X.onnx_data; or by turns there and to X.onnx_data_1, at odd offsets."""
    files = [path.with_name(path.name + end) for end in ("_data", "_data_1")[: 1 + several]]
    contents = [bytearray() for _ in files]
    for number, tensor in enumerate(made.graph.initializer):
        if len(tensor.raw_data) < 256:
            continue
        at = number % len(files)
        contents[at] += b"\0" * (3 if several else 0)
        where = {
            "location": files[at].name, "offset": len(contents[at]), "length": len(tensor.raw_data)
        }  # fmt: skip
        contents[at] += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)


def genai(place: Path, model: Any, **search: Any) -> None:
    """The one file that onnxruntime-genai's builder writes, instead of config.json."""
    (place / "config.json").unlink()
    config = model.config
    told = {
        "model": {
            "type": "llama", "vocab_size": config.vocab_size, "bos_token_id": 1,
            "eos_token_id": [2, 5], "pad_token_id": 0, "context_length": 96,
            "decoder": {
                "num_attention_heads": config.num_attention_heads, "head_size": config.head_dim,
                "num_key_value_heads": config.num_key_value_heads, "filename": "model.onnx",
                "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
            },
        },
        "search": {"do_sample": False, "max_length": 96, "top_k": 50, "top_p": 1.0, **search},
    }  # fmt: skip
    (place / "genai_config.json").write_text(json.dumps(told))


def greedy(path: Path, row: Sequence[int], count: int, single: bool = False) -> list[int]:
    """The likeliest tokens after a row as the graph alone gives them: one `run` a token.

    Args:
        single: the row, too, is read a token at a time.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {one.name: one for one in session.get_inputs()}
    held: dict[str, NDArray[Any]] = {
        name: np.zeros(
            (1, one.shape[1], 0, one.shape[3]), np.float16 if "16" in one.type else np.float32
        )
        for name, one in given.items()
        if name.startswith("past")
    }
    start = 1 if single else len(row)
    ids, rest, found = np.array([row[:start]], np.int64), [*row[start:]], []
    outputs = [one.name for one in session.get_outputs()]
    while len(found) < count:
        past = next(iter(held.values())).shape[2]
        fed = held | {
            "input_ids": ids, "num_logits_to_keep": np.array(1),
            "attention_mask": np.ones((1, past + ids.shape[1]), np.int64),
            "position_ids": np.arange(past, past + ids.shape[1])[None],
            "use_cache_branch": np.array([past > 0]),
        }  # fmt: skip
        told = session.run(outputs, {name: one for name, one in fed.items() if name in given})
        said = dict(zip(outputs, told, strict=True))
        if rest:
            ids = np.array([[rest.pop(0)]])
        else:
            found.append(int(said["logits"][0, -1].argmax()))
            ids = np.array([[found[-1]]])
        held = {name: said[name.replace("past_key_values", "present")] for name in held}
    return found
