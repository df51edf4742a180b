"""Programs that read exported files, as the tests drive them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

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
