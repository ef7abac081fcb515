"""llama.cpp through llama-cpp-python's plain bindings: its high-level class has no batches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.cases import Case
from peers.engines import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUND = 256  # a row's cache has a multiple of so many positions


class Adapter(Engine):
    title = "llama.cpp"
    precisions: ClassVar = {
        "fp32": "F32",
        "int8": "Q8_0",
        "int6": "Q6_K",
        "int4-k": "Q4_K_M",
        "int4": "Q4_0",
    }
    build: ClassVar = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    note = (
        "greedy through the C API, logits compared in numpy; built from source for this machine; "
        "quantised by itself from float32. Its K types take blocks of 256 inputs: matrices with "
        "another number of them (576 of SmolLM2, 640 of Gemma 3) get Q8_0 or Q5_0 instead"
    )
    model: Any
    cache_type: int
    threads: int
    context: Any
    sizes: tuple[int, int]

    @classmethod
    def refuses(cls, case: Case) -> str:
        return "has no beam search" if case.beams > 1 else super().refuses(case)

    @classmethod
    def converter(cls, shape: str) -> str:
        return "llama-convert"

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        import llama_cpp

        full = target / "full.gguf"
        write_gguf(source, full)
        if precision == "fp32":
            full.rename(target / "model.gguf")
            return
        settings = llama_cpp.llama_model_quantize_default_params()
        kind = Adapter.precisions[precision]
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        model = str(target / "model.gguf").encode()
        failed = llama_cpp.llama_model_quantize(str(full).encode(), model, settings)
        full.unlink()
        if failed:
            raise RuntimeError(f"llama_model_quantize gave {failed}")

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import llama_cpp

        llama_cpp.llama_backend_init()
        path = str(directory / "model.gguf").encode()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path, settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {directory}")
        exact = precision == "fp32"
        self.cache_type = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
        self.threads = threads
        self.context, self.sizes = None, (0, 0)

    def sized(self, rows: int, length: int) -> Any:
        """A context for rows of that length, kept: one sized for 8 rows is slower for one."""
        import llama_cpp

        sizes = rows, -(-length // ROUND) * ROUND
        if sizes != self.sizes:
            if self.context:
                llama_cpp.llama_free(self.context)
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx = settings.n_batch = rows * sizes[1]
            settings.n_seq_max = rows
            settings.n_threads = settings.n_threads_batch = self.threads
            settings.type_k = settings.type_v = self.cache_type
            self.context = llama_cpp.llama_init_from_model(self.model, settings)
            self.sizes = sizes
        return self.context

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        import llama_cpp
        import numpy as np

        context = self.sized(len(prompts), max(map(len, prompts)) + new)
        vocab = self.vocab()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(sum(map(len, prompts)), 0, 1)
        lengths = [0] * len(prompts)
        ids: list[list[int]] = [[] for _ in prompts]
        fresh = prompts
        for step in range(new):
            last = fill(batch, fresh, lengths)
            if code := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode gave {code}")
            for row, place in enumerate(last):
                logits = llama_cpp.llama_get_logits_ith(context, place)
                ids[row].append(int(np.ctypeslib.as_array(logits, (vocab,)).argmax()))
            if step == 0:
                self.first = time.perf_counter()
            fresh = [row[-1:] for row in ids]
        llama_cpp.llama_batch_free(batch)
        return ids

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        import llama_cpp
        import numpy as np

        context = self.sized(1, len(row))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(len(row), 0, 1)
        fill(batch, [row], [0])
        for place in range(len(row)):
            batch.logits[place] = 1
        code = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        found = llama_cpp.llama_get_logits(context)
        return np.array(np.ctypeslib.as_array(found, (len(row), self.vocab())))

    def vocab(self) -> int:
        """The number of tokens that it knows."""
        import llama_cpp

        return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))


def fill(batch: Any, fresh: list[list[int]], lengths: list[int]) -> list[int]:
    """Put the new tokens of every row into the batch; the places of each row's last one."""
    place, last = 0, []
    for row, tokens in enumerate(fresh):
        for token in tokens:
            batch.token[place] = token
            batch.pos[place] = lengths[row]
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = 0
            lengths[row] += 1
            place += 1
        batch.logits[place - 1] = 1
        last.append(place - 1)
    batch.n_tokens = place
    return last


def write_gguf(source: Path, path: Path) -> None:
    """A transformers model of three kinds as GGUF, with llama.cpp's names and no vocabulary.

    llama.cpp's own converter knows tokenizers by a list of hashes, and refuses others.
    """
    import gguf
    import numpy as np

    config = json.loads((source / "config.json").read_text())
    kind = config["model_type"]
    arch = {
        "gpt2": gguf.MODEL_ARCH.GPT2,
        "llama": gguf.MODEL_ARCH.LLAMA,
        "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    }[kind]
    layers = config["n_layer"] if kind == "gpt2" else config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    describe(writer, config, layers)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in tensors(source / "model.safetensors"):
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            # Of a Llama, llama.cpp rotates neighbours, transformers halves.
            if kind == "llama" and part in name:
                pairs = tensor.reshape(config[heads], 2, -1, tensor.shape[-1])
                tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        if kind == "gemma3_text" and name.endswith("norm.weight"):
            tensor = tensor + 1  # transformers adds it when the norm runs
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(new_name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and float32 arrays of a safetensors file, one after the other, from F32 or BF16."""
    import numpy as np

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    held = np.memmap(path, np.uint8, "r", offset=8 + length)
    for name, said in header.items():
        start, end = said["data_offsets"]
        bits = held[start:end]
        if said["dtype"] == "BF16":
            bits = bits.view(np.uint16).astype(np.uint32) << 16
        yield name, bits.view(np.float32).reshape(said["shape"])


def describe(writer: Any, config: dict[str, Any], layers: int) -> None:
    """The settings of the model that llama.cpp must know."""
    import gguf

    writer.add_block_count(layers)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["model_type"] == "gemma3_text":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_sliding_window(config["sliding_window"])
    else:
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
