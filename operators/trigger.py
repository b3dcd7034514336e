"""The trigger's address of before it had a room: Airflow's database holds it for tasks that were deferred then."""

from operators.ray.trigger import RayJobTrigger as RayJobTrigger
