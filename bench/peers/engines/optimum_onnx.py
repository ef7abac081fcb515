"""optimum-onnx: transformers' `generate` on torch tensors, with onnxruntime as the model."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.engines import Engine, generate_of_transformers, logits_of_transformers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Adapter(Engine):
    title = "optimum-onnx"
    precisions: ClassVar = {"fp32": "float32", "int8": "dynamic int8"}
    model: Any

    @classmethod
    def converter(cls, shape: str) -> str:
        return "optimum_onnx"

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        model = ORTModelForCausalLM.from_pretrained(source, export=True)
        if precision == "fp32":
            model.save_pretrained(target)
            return
        full = target / "fp32"
        model.save_pretrained(full)
        quantizer = ORTQuantizer.from_pretrained(full)
        kind = getattr(AutoQuantizationConfig, instructions())
        settings = kind(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=target, quantization_config=settings)

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        names = [path.name for path in directory.glob("*.onnx")]
        self.model = ORTModelForCausalLM.from_pretrained(
            directory, file_name=names[0], session_options=options
        )

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        return generate_of_transformers(self.model, prompts, new, beams)

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        return logits_of_transformers(self.model, row)


def instructions() -> str:
    """optimum's name for what this processor has."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    cpu = Path("/proc/cpuinfo")
    return "avx512_vnni" if cpu.exists() and "avx512_vnni" in cpu.read_text() else "avx2"
