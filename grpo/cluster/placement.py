"""Placement of the engines: which ones share a node, whether they fit, and the Ray placement groups that reserve room.

A bundle must be on one node: a sampler with all its workers, a learner rank or, if they share GPUs, a sampler and the
ranks on its GPUs. There is one placement group per role: "engines" if samplers and learner are colocated, otherwise
"samplers" and "learner"; and "rewards" for nodes with reward workers. Ray waits silently for what it cannot place, so
the fit is checked first.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.config import Config
from grpo.types import UserError

ENGINES = ("engines", "samplers", "learner")
"""Roles that have GPUs."""
SLACK = 1e-9
"""Tolerance of sums. Ray counts in ten-thousandths, and float sums of such shares may miss a whole number by this."""
TRIED = 5_000
"""Maximum steps of the search for a placement, after which it fails.

For 128 bundles on 32 nodes this takes a second. For a few bundles, all placements are tried.
"""


THIS_MACHINE = "this machine"
"""Name of the node of a private Ray."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Engines and resources that must be on one node."""

    role: str
    samplers: tuple[int, ...]
    ranks: tuple[int, ...]
    rewards: tuple[int, ...] = ()
    """Indices of nodes with reward workers, below `cluster.reward_nodes`."""
    cpus: float
    gpus: int

    @property
    def who(self) -> str:
        """Return the names of the engines in the bundle."""
        named = [f"sampler {i}" for i in self.samplers] + [f"node {i} of the reward workers" for i in self.rewards]
        if self.ranks:
            first, last = self.ranks[0], self.ranks[-1]
            named.append(f"learner rank {first}" if first == last else f"learner ranks {first} to {last}")
        return " with ".join(named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Total and free resources of one node."""

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float

    def __str__(self) -> str:
        return f"{self.name} with {self.free_cpus:g} of {self.cpus:g} CPUs and {self.free_gpus:g} of {self.gpus:g} GPUs"


def bundles(config: Config) -> list[Bundle]:
    """Return every bundle of the run."""
    return _bundles_of_engines(config) + [
        Bundle(role="rewards", samplers=(), ranks=(), rewards=(i,), cpus=config.rewards_on(i), gpus=0)
        for i in range(config.cluster.reward_nodes)
    ]


def _bundles_of_engines(config: Config) -> list[Bundle]:
    c, workers = config.cluster, config.sampler_workers
    gpus = workers if config.on_gpu else 0
    if c.layout == "disaggregated":
        return [
            Bundle(role="samplers", samplers=(i,), ranks=(), cpus=c.sampler_cpus, gpus=gpus) for i in range(c.samplers)
        ] + [
            Bundle(role="learner", samplers=(), ranks=(i,), cpus=c.learner_cpus, gpus=min(gpus, 1))
            for i in range(c.learner_ranks)
        ]
    found = []
    for i in range(max(c.samplers, -(-c.learner_ranks // workers))):
        samplers = tuple(range(i, min(i + 1, c.samplers)))
        ranks = tuple(range(i * workers, min((i + 1) * workers, c.learner_ranks)))
        cpus = len(samplers) * c.sampler_cpus + len(ranks) * c.learner_cpus
        found.append(Bundle(role="engines", samplers=samplers, ranks=ranks, cpus=cpus, gpus=gpus))
    return found


def check_fit(config: Config, nodes: Sequence[Node], place: str) -> None:
    """Raise UserError unless there is a node for every bundle.

    The message lists what is requested, what each node has, and how much of it is free. Ray uses a different
    search, which may fail where this check passes: see `Reservation`.
    """
    if lacking := lacking_room(config, nodes, place):
        raise UserError(
            f"{lacking}; lower cluster.samplers, cluster.learner_ranks, cluster.sampler_cpus or cluster.learner_cpus"
            + (", or let more share these CPUs: cluster.cpus" if place == THIS_MACHINE else "")
        )


def lacking_room(config: Config, nodes: Sequence[Node], place: str) -> str:
    """Return "" if there is a node for every bundle, else what is requested, and what each node has and has left."""
    asked = bundles(config)
    bundle = _left_out(sorted(asked, key=_size, reverse=True), [(node.free_gpus, node.free_cpus) for node in nodes])
    if bundle is None:
        return ""
    c = config.cluster
    return (
        f"{bundle.who} finds no node with {bundle.cpus:g} CPUs and {bundle.gpus} GPUs free on {place}: "
        f"{c.samplers} samplers and {c.learner_ranks} learner ranks, {c.layout},{_rewards(config)} ask for "
        f"{sum(b.cpus for b in asked):g} CPUs and {sum(b.gpus for b in asked)} GPUs; there is "
        f"{'; '.join(map(str, nodes)) or 'no node'}"
    )


def emptied(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes with all their resources free."""
    return [dataclasses.replace(node, free_cpus=node.cpus, free_gpus=node.gpus) for node in nodes]


def _left_out(asked: Sequence[Bundle], nodes: Sequence[tuple[float, float]]) -> Bundle | None:
    """Return the first bundle that finds no node when each takes the fullest node with room for it; None if all fit.

    All placements are tried, in at most `TRIED` steps. Nodes with equal free resources are interchangeable.
    """
    left_out, seen = None, set()
    ways = [(0, tuple(sorted(nodes)))]  # (number of placed bundles, free resources of the nodes)
    while ways and (left_out is None or len(seen) < TRIED):
        way = ways.pop()
        if way in seen:
            continue
        seen.add(way)
        placed, left = way
        if placed == len(asked):
            return None
        bundle = asked[placed]
        holding = [n for n in set(left) if bundle.gpus <= n[0] + SLACK and bundle.cpus <= n[1] + SLACK]
        if not holding:
            left_out = left_out or bundle
        for node in sorted(holding, reverse=True):  # the fullest is popped first
            rest = list(left)
            rest[rest.index(node)] = node[0] - bundle.gpus, node[1] - bundle.cpus
            ways.append((placed + 1, tuple(sorted(rest))))
    return left_out


def _size(bundle: Bundle) -> tuple[int, float]:
    return bundle.gpus, bundle.cpus


def _rewards(config: Config) -> str:
    return f" and {config.reward_workers} reward workers" if config.cluster.reward_nodes else ""


class Reservation:
    """Placement groups of a run. Ray removes them when the driver ends, however it ends."""

    def __init__(self, config: Config, timeout_s: float, roles: Sequence[str]) -> None:
        """Reserve the places of the `roles`.

        Raises TimeoutError when Ray has not granted the places within `timeout_s`: others have taken them, or they only
        fit as `check_fit` places them. Ray places one group after the other, gives a bundle the emptiest node, and does
        not backtrack: it does not place 4, 3 and 2 CPUs on nodes of 4 and 5 CPUs.
        """
        self._groups: dict[str, PlacementGroup] = {}
        self._strategies: dict[tuple[str, int], PlacementGroupSchedulingStrategy] = {}
        asked = bundles(config)
        # Ray places one group after the other, and small bundles still fit later
        largest_first = sorted(asked, key=_size, reverse=True)
        for role in dict.fromkeys(bundle.role for bundle in largest_first if bundle.role in roles):
            ours = [bundle for bundle in asked if bundle.role == role]
            how = "SPREAD" if role == "rewards" else "PACK"
            group = placement_group([_resources(bundle) for bundle in ours], strategy=how, name=named(role))
            self._groups[role] = group
            for index, bundle in enumerate(ours):
                strategy = PlacementGroupSchedulingStrategy(group, index, placement_group_capture_child_tasks=False)
                self._strategies |= {("sampler", i): strategy for i in bundle.samplers}
                self._strategies |= {("learner", i): strategy for i in bundle.ranks}
                self._strategies |= {("rewards", i): strategy for i in bundle.rewards}
        for role, group in self._groups.items():
            if not group.wait(timeout_s):
                self.release()
                raise TimeoutError(f"Ray has not placed the {role} within {timeout_s:.0f} s, although they fit")

    def of(self, kind: str, index: int) -> PlacementGroupSchedulingStrategy:
        """Return the strategy that puts the actor `index` of `kind` (sampler, learner or rewards) in its place."""
        return self._strategies[kind, index]

    def release(self) -> None:
        """Release the places to the cluster that was joined.

        A private Ray needs no release: it ends with the driver. If it is already dying, Ray would wait a minute for an
        answer and then end the process.
        """
        if ray._private.worker.global_worker.node.all_processes:  # a private Ray: this process has started it
            return
        for group in self._groups.values():
            remove_placement_group(group)


def named(role: str) -> str:
    """Return a unique name for a placement group, as the dashboard shows it.

    Ray requires unique names in a namespace, and counts removed groups.
    """
    return f"grpo-{role}-{secrets.token_hex(4)}"


def _resources(bundle: Bundle) -> dict[str, float]:
    return {"CPU": bundle.cpus} | ({"GPU": float(bundle.gpus)} if bundle.gpus else {})


def nodes_of_cluster() -> list[Node]:
    """Return the live nodes of the cluster that this process has joined."""
    from ray._private.state import available_resources_per_node  # noqa: PLC0415 - ray has no public call for it

    free = available_resources_per_node()
    return [
        Node(
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            free_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
