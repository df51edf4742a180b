"""Programs that read exported files, as the tests drive them."""

import ctypes
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch


class Llama:
    """llama.cpp, by the wheel of xllamacpp."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 64, 64
        params.n_parallel, params.n_gpu_layers, params.verbosity = 1, 0, 0
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def log_probs(self, tokens: Sequence[int], vocab_size: int) -> torch.Tensor:
        """Log-probabilities (V,) of the token behind these, in float64."""
        # it tells them with the token that it takes, which must be one with a text; they are those
        # before it was led to that one
        settings = {"n_probs": vocab_size, "logit_bias": [[ord("A") + 1, 1000]]}
        answer = self.complete(list(tokens), n_predict=1, **settings)
        found = answer["logprobs"]["content"][0]["top_logprobs"]
        values = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
        for entry in found:
            values[entry["id"]] = entry["logprob"]
        return values

    def ask(self, place: str, **content: Any) -> dict[str, Any]:
        """What its server on this machine answers."""
        data = json.dumps(content).encode()
        request = Request(f"{self.server.listening_address}/{place}", data)
        with urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def complete(self, prompt: str | list[int], **settings: Any) -> dict[str, Any]:
        """A continuation of a text or of tokens, drawn from all unless samplers are given."""
        asked = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "samplers": []}
        choice: dict[str, Any] = self.server.handle_completions(asked | settings)["choices"][0]
        return choice


class RwkvCpp:
    """rwkv.cpp, by its shared library, whose path RWKV_CPP_LIBRARY tells."""

    def __init__(self, path: Path) -> None:
        if not (library := os.environ.get("RWKV_CPP_LIBRARY")):
            pytest.skip("rwkv.cpp has no package: build it, and set RWKV_CPP_LIBRARY=librwkv.so")
        self.library = ctypes.CDLL(library)
        self.library.rwkv_init_from_file.restype = ctypes.c_void_p
        for name in ("rwkv_get_state_len", "rwkv_get_logits_len"):
            getattr(self.library, name).restype = ctypes.c_size_t
        self.library.rwkv_eval.restype = ctypes.c_bool
        made = self.library.rwkv_init_from_file(os.fsencode(path), 1, 0)
        assert made, f"rwkv.cpp does not open {path}"
        self.context = ctypes.c_void_p(made)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (T, V) behind each token."""
        state = (ctypes.c_float * self.library.rwkv_get_state_len(self.context))()
        found = (ctypes.c_float * self.library.rwkv_get_logits_len(self.context))()
        self.library.rwkv_init_state(self.context, state)
        rows = []
        for token in tokens:
            assert self.library.rwkv_eval(self.context, token, state, state, found)
            rows.append(torch.tensor(list(found)))
        return torch.stack(rows)


def web_rwkv_logits(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of web-rwkv, by the wheel of web-rwkv-py, behind each token."""
    web_rwkv = pytest.importorskip("web_rwkv_py", reason="web-rwkv-py is not installed")
    # read when a device is made: on several threads Mesa's lavapipe gives other logits each time
    os.environ["LP_NUM_THREADS"] = "1"
    try:
        model = web_rwkv.Model(str(path), quant=0, quant_nf4=0)
    except ValueError as error:
        if "failed to request" not in str(error):
            raise
        pytest.skip("web-rwkv finds no device of Vulkan: apt-get install mesa-vulkan-drivers")
    return torch.stack([torch.tensor(model.run([token])) for token in tokens])


def fla_models() -> Any:
    """The model classes of flash-linear-attention."""
    with warnings.catch_warnings():
        # that there is no GPU, and of its deprecated imports
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla.models", reason="flash-linear-attention is not installed")
