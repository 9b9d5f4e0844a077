"""llama.cpp itself: its converters as scripts, its runtime by ctypes.

`LLAMA_CPP` is the folder of its sources, as in the source distribution of llama-cpp-python; the
bindings of that name are imported.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

#: Its converter of models, for a model of bytes that has no vocabulary which it knows.
_MODEL = """
import sys, os
sys.path.insert(0, os.environ["LLAMA_CPP"])
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[1:]]
import convert_hf_to_gguf as script
from conversion import llama
llama.LlamaModel.set_vocab = lambda self: self._set_vocab_none()
script.main()
"""


def model_as_gguf(model: Path, file: Path) -> Path:
    _run([sys.executable, "-c", _MODEL, str(model), "--outfile", str(file), "--outtype", "f32"])
    return file


def adapter_as_gguf(adapter: Path, base: Path, file: Path) -> Path:
    script = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    _run([sys.executable, str(script), str(adapter), "--base", str(base), "--outfile", str(file),
          "--outtype", "f32"])  # fmt: skip
    return file


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def runtime_loss(model: Path, adapter: Path | None, text: Path, windows: int = 24) -> float:
    """Mean nats per byte on the first windows of 256 predicted bytes, by llama.cpp's runtime."""
    import llama_cpp.llama_cpp as native

    tokens = list(text.read_bytes())
    native.llama_backend_init()
    loaded = native.llama_model_load_from_file(
        str(model).encode(), native.llama_model_default_params()
    )
    assert loaded
    params = native.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    context = native.llama_init_from_model(loaded, params)
    assert context
    if adapter is not None:
        held = native.llama_adapter_lora_init(loaded, str(adapter).encode())
        assert held
        kept = (native.llama_adapter_lora_p_ctypes * 1)(held)
        assert native.llama_set_adapters_lora(context, kept, 1, (ctypes.c_float * 1)(1.0)) == 0
    total = 0.0
    batch = native.llama_batch_init(256, 0, 1)
    for start in range(0, 256 * windows, 256):
        native.llama_memory_clear(native.llama_get_memory(context), True)
        batch.n_tokens = 256
        for i in range(256):
            batch.token[i], batch.pos[i] = tokens[start + i], i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        assert native.llama_decode(context, batch) == 0
        found = native.llama_get_logits(context)
        logits = np.ctypeslib.as_array(found, shape=(256, 256)).astype(np.float64)
        targets = tokens[start + 1 : start + 257]
        top = logits.max(axis=1)
        spread = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        total += float((spread - logits[np.arange(256), targets]).sum())
    native.llama_batch_free(batch)
    native.llama_free(context)
    native.llama_model_free(loaded)
    return total / (256 * windows)
