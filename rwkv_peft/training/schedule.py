"""Learning-rate schedules over optimizer steps."""

import math

from rwkv_peft.training.settings import Settings

# share of the steps over which `wsd` falls at the end
WSD_DECAY = 0.2


def rates(settings: Settings, step: int, total: int) -> tuple[float, float]:
    """Learning rate and weight decay of optimizer step `step` (from 0) of `total`."""
    lr = learning_rate(
        step,
        total=total,
        schedule=settings.lr_schedule,
        lr_init=settings.lr_init,
        lr_final=settings.lr_final,
        warmup_steps=settings.warmup_steps,
    )
    first, last = settings.weight_decay, settings.weight_decay_final
    return lr, weight_decay(step, total=total, first=first, last=last)


def learning_rate(
    step: int, *, total: int, schedule: str, lr_init: float, lr_final: float, warmup_steps: int
) -> float:
    """Rate of optimizer step `step` (from 0) of `total`.

    'cos' falls from lr_init to lr_final over all steps by half a cosine; 'wsd' stays at lr_init and
    falls to lr_final over the last fifth, linearly. While step < warmup_steps the rate is
    multiplied by 0.01 + 0.99 step / warmup_steps.
    """
    progress = step / max(total - 1, 1)
    if schedule == "wsd":
        fall = min(1.0, max(0.0, (progress - (1 - WSD_DECAY)) / WSD_DECAY))
    else:
        fall = 0.5 - 0.5 * math.cos(math.pi * progress)
    rate = lr_init + (lr_final - lr_init) * fall
    if step < warmup_steps:
        rate *= 0.01 + 0.99 * step / warmup_steps
    return rate


def weight_decay(step: int, *, total: int, first: float, last: float) -> float:
    """Decay of optimizer step `step` (from 0) of `total`: from `first` to `last` geometrically.

    A `last` that is not above 0 means `first` throughout.
    """
    if last <= 0 or first <= 0:
        return first
    return float(first * (last / first) ** (step / max(total - 1, 1)))
