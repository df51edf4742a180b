"""How much a run asks of a device, and how much that gives."""

import time

import torch

from rwkv_peft.models import build
from rwkv_peft.training.run_state import Run

# rows and columns of the product by which a device is measured, and how often it is taken
SIDE, TIMES = 4096, 10


def count_flops(run: Run) -> float:
    """Operations of matrix products for a token, forward and backward, without recomputing.

    Two for each weight of a product forward and two for the gradient of its input; two more for its
    own gradient if it is trained. The recurrence and what goes element by element are left out.
    """
    config = run.model.model_config
    weights = sum(x.numel() for x in build(config, op="reference").parameters())
    products = weights - config.vocab_size * config.n_embd
    trained = sum(x.numel() for x in run.target.parameters.values() if x.ndim == 2)
    if run.settings.peft == "state":
        return 4.0 * products
    if run.settings.peft == "none":
        return 4.0 * products + 2.0 * min(trained, products)
    return 4.0 * products + 6.0 * trained


def measure_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a large product on a device; None on a CPU, or for lack of memory."""
    if device.type == "cpu":
        return None
    try:
        x = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
        y = x @ x
        torch.accelerator.synchronize()
        started = time.perf_counter()
        for _ in range(TIMES):
            torch.mm(x, x, out=y)
        torch.accelerator.synchronize()
    except torch.OutOfMemoryError:
        return None
    return TIMES * 2.0 * SIDE**3 / (time.perf_counter() - started)
