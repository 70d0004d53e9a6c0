"""Placement groups that outlive the actor that made them: Ray frees their CPUs only when the whole job ends.

A training within a trial of Ray Tune leaves one when the trial is stopped (ray issue 54305). Ray Train's own cleaner
asks the dashboard whether its training is alive, and a local Ray has none.
"""

import time

import ray
from ray._private.state import gcs_pb2, state
from ray.util.placement_group import PlacementGroup, remove_placement_group

_REMOVED = gcs_pb2.PlacementGroupTableData.PlacementGroupState.REMOVED


def remove_orphans() -> int:
    """Removes this job's placement groups whose maker, an actor, is dead, and returns how many; a driver's stay."""
    removed = 0
    for group in _groups_of_actors():
        if group.creator_actor_dead or _is_dead(group.creator_actor_id):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            removed += 1
    return removed


def remove_last_orphans(limit_s: float) -> int:
    """Removes orphans until no actor of this job has a placement group, and returns how many still have one.

    For the end of the work: a maker may die after its caller has heard its last word.
    """
    deadline_s = time.monotonic() + limit_s
    while left := len(_groups_of_actors()):
        remove_orphans()
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.1)
    return left


def _is_dead(actor_id: bytes) -> bool:
    """Whether an actor is dead; a group that it asked for last may have been made after its death, and not tell."""
    told = state._connect_and_get_accessor().get_actor_info(ray.ActorID(actor_id))
    return told is None or gcs_pb2.ActorTableData.FromString(told).state == gcs_pb2.ActorTableData.ActorState.DEAD


def _groups_of_actors() -> list[gcs_pb2.PlacementGroupTableData]:
    """This job's placement groups that an actor made and nobody removed; detached ones are meant to stay."""
    job, found = ray.get_runtime_context().get_job_id(), []
    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(data)
        by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        ours = group.creator_job_id.hex() == job and not group.is_detached
        if ours and by_actor and group.state != _REMOVED:
            found.append(group)
    return found
