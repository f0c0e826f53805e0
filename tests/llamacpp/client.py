"""Run in an environment with llama-cpp-python: next-token logits under control vectors.

    python client.py MODEL.gguf REQUEST.json OUT.npz

REQUEST holds `tokens` and `vectors`: name -> [GGUF control vector or null, strength]. Each is
applied by llama.cpp's own call; OUT has the last token's logits under each name.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np
from gguf import GGUFReader


def buffer(path: str, strength: float, n_layers: int, width: int) -> np.ndarray:
    """What llama.cpp's call takes: a row for every block from 1 on, zero where there is none."""
    rows = np.zeros((n_layers - 1, width), dtype=np.float32)
    for tensor in GGUFReader(path).tensors:
        rows[int(tensor.name.removeprefix("direction.")) - 1] = strength * tensor.data
    return rows


def main(model_path: str, request_path: str, out: str) -> None:
    with open(request_path) as file:
        request = json.load(file)
    model = llama_cpp.Llama(
        model_path, n_ctx=256, n_threads=2, logits_all=False, verbose=False, seed=0
    )
    inner = model._model.model
    n_layers, width = llama_cpp.llama_model_n_layer(inner), llama_cpp.llama_model_n_embd(inner)
    found = {}
    for name, (path, strength) in request["vectors"].items():
        rows = None if path is None else buffer(path, strength, n_layers, width)
        data = None if rows is None else rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size = 0 if rows is None else rows.size
        code = llama_cpp.llama_set_adapter_cvec(model.ctx, data, size, width, 1, n_layers - 1)
        if code != 0:
            raise SystemExit(f"llama.cpp refused {path} ({code})")
        model.reset()
        model.eval(request["tokens"])
        last = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        found[name] = np.ctypeslib.as_array(last, shape=(model.n_vocab(),)).copy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
