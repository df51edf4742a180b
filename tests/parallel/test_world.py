"""Who started a process, and where the ranks of a run meet."""

import pytest

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.parallel.world import World, find_world, first_host, fit_config

# as torchrun --nnodes 2 --nproc_per_node 4 sets them on the second machine
TORCHRUN = {
    "RANK": "6",
    "LOCAL_RANK": "2",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
# as srun --ntasks 4 --nodes 2 does
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_the_variables_of_torchrun_tell_the_place_of_a_process() -> None:
    world = find_world(TrainConfig(), TORCHRUN)
    assert world == World(6, 2, 8, 4, "gpu01", 29500, True, name="0")
    config = fit_config(TrainConfig(), world)
    assert (config.devices, config.num_nodes) == (4, 2)
    assert fit_config(TrainConfig(devices=4, num_nodes=2), world) == config


def test_the_variables_of_the_launcher_of_deepspeed_tell_it_too() -> None:
    # it holds no store, and has another name for the processes of a machine
    given = {n: x for n, x in TORCHRUN.items() if not n.startswith(("TORCH", "LOCAL_WORLD"))}
    world = find_world(TrainConfig(), {**given, "LOCAL_SIZE": "4", "CROSS_SIZE": "2"})
    assert world == World(6, 2, 8, 4, "gpu01", 29500, False)
    # others set that name as well
    both = {**TORCHRUN, "LOCAL_SIZE": "1"}
    assert find_world(TrainConfig(), both) == find_world(TrainConfig(), TORCHRUN)


def test_a_config_of_other_devices_than_processes_is_refused() -> None:
    world = find_world(TrainConfig(), TORCHRUN)
    with pytest.raises(ConfigError, match="8 processes were started, 4 a machine"):
        fit_config(TrainConfig(devices=8), world)


def test_one_process_of_torchrun_is_alone() -> None:
    assert find_world(TrainConfig(), {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


def test_the_variables_of_slurm_count_where_the_job_has_a_task_for_each_device() -> None:
    world = find_world(TrainConfig(devices=2, num_nodes=2), SLURM)
    assert world is not None
    assert (world.rank, world.local_rank, world.size, world.local_size) == (3, 1, 4, 2)
    assert (world.address, world.is_held) == ("gpu03", False)
    # one process in a job of many tasks, as in a batch script without srun
    assert find_world(TrainConfig(), SLURM) is None
    assert find_world(TrainConfig(devices=2), SLURM) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,12],login1", "gpu03"),
        ("node-a[1,3]", "node-a1"),
        ("one,two", "one"),
        ("lonely", "lonely"),
    ],
)
def test_the_first_machine_of_a_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_variables_that_cannot_be_read_are_told() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        find_world(TrainConfig(), {**TORCHRUN, "RANK": "first"})
