"""Several processes, each with a device of its own (a rank), that train one model together.

`world.py` knows which of them this one is, whoever started them: the command itself, torchrun or
SLURM. `strategy.py` says what they share and how; `Strategy` is one device alone, for which nothing
of `torch.distributed` is imported. `fsdp.py` and `deepspeed.py` give each rank a part of what `Ddp`
has on each; what DeepSpeed has is stepped by `training/zero.py`. `watch.py` ends all ranks when one
is lost.

Every rank takes its share of the micro-batches of each optimizer step and reads the same files.
Rank 0 leads: it alone takes the run's folder, prints and writes; the others do what it asks for
between two steps (`training/follow.py`).
"""
