"""What a job says while it waits for room on the cluster."""

from stages.config.execution import ExecutionConfig
from stages.job.workers import describe_shortage


def test_the_shortage_names_what_is_asked_what_there_is_and_what_is_free():
    execution = ExecutionConfig(num_workers=8, cpus_per_worker=4, gpus_per_worker=1)
    told = describe_shortage(execution, {"CPU": 32.0, "GPU": 4.0}, {"CPU": 30.0, "GPU": 2.0})
    assert told == "asked 8 GPU, cluster has 4, 2 free; asked 32 CPU, cluster has 32, 30 free (8 workers)"


def test_an_elastic_stage_waits_for_its_fewest_workers_only():
    execution = ExecutionConfig(num_workers=8, min_workers=2, gpus_per_worker=1, checkpoint_every=10)
    assert describe_shortage(execution, {}, {}).startswith("asked 2 GPU, cluster has 0, 0 free")
