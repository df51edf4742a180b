"""Which of several processes this one is, and where they meet."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError

# what torchrun tells each process, and the command those that it starts
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# set where the one who started the processes holds the place in which they meet, as torchrun does
HELD = "TORCHELASTIC_USE_AGENT_STORE"
# set for the processes that the command starts, whose end it tells the user
OWN = "RWKV_PEFT_IS_A_RANK"
_Config = TypeVar("_Config", bound=TrainConfig)


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run.

    Attributes:
        rank: its number, from 0, over all machines.
        local_rank: on its machine, which is the number of its device.
        size, local_size: how many there are, and on this machine.
        address, port: where they meet.
        is_held: whoever started them waits there; or else rank 0 does.
        is_own: the command has started them, and says what became of them.
        name: of the meeting, as there may be others at the place.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    address: str
    port: int
    is_held: bool
    is_own: bool = False
    name: str = ""


def find_world(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> World | None:
    """The place of this process among others; None if it was started alone.

    SLURM tells every process of a job of how many tasks it is, also where srun did not start
    them: it is asked where the job has as many tasks as the run has devices.

    Raises:
        ConfigError: the variables of torchrun or SLURM cannot be read.
    """
    if "LOCAL_SIZE" in environment:
        # by the launcher of DeepSpeed, which sets all but this as torchrun does
        environment = {"LOCAL_WORLD_SIZE": environment["LOCAL_SIZE"], **environment}
    try:
        if all(name in environment for name in VARIABLES):
            return _read_torchrun(environment)
        wanted = config.devices * config.num_nodes
        if wanted > 1 and environment.get("SLURM_NTASKS") == str(wanted):
            return _read_slurm(environment, config.devices)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the variables of torchrun or SLURM cannot be read ({error}): start the run with "
            "srun, torchrun or the command alone"
        ) from error
    return None


def fit_config(config: _Config, world: World | None) -> _Config:
    """A config with the devices and machines of the processes that there are.

    Raises:
        ConfigError: it names others.
    """
    if world is None:
        return config
    there = world.local_size, world.size // world.local_size
    if (config.devices, config.num_nodes) not in ((1, 1), there):
        raise ConfigError(
            f"--devices {config.devices} --num_nodes {config.num_nodes}: {world.size} processes "
            f"were started, {world.local_size} a machine: leave both out, or give --devices "
            f"{there[0]} --num_nodes {there[1]}"
        )
    return replace(config, devices=there[0], num_nodes=there[1])


def _read_torchrun(environment: Mapping[str, str]) -> World | None:
    rank, local_rank, size, local_size = (int(environment[name]) for name in VARIABLES[:4])
    if size == 1:
        return None
    return World(
        rank,
        local_rank,
        size,
        local_size,
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        environment.get(HELD) == "True",
        OWN in environment,
        environment.get("TORCHELASTIC_RESTART_COUNT", ""),
    )


def _read_slurm(environment: Mapping[str, str], devices: int) -> World:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job = int(environment["SLURM_JOB_ID"])
    return World(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_LOCALID"]),
        int(environment["SLURM_NTASKS"]),
        devices,
        environment.get("MASTER_ADDR") or first_host(nodes),
        # another for each job of a machine, below those that systems give away
        int(environment.get("MASTER_PORT") or 15000 + job % 15000),
        False,
    )


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it, such as gpu[03-07,12],login1."""
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if not found:
        raise ValueError(f"no machine in '{nodes}'")
    return found[1] + (found[2] or "")
