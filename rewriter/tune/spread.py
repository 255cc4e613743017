"""Measuring ahead of a search on the machines of a Ray cluster.

Every node runs one worker, which loads the model and the data by their names and does what the search would do: it
times sites, scores the original and predicts effects, and sends back what its ledger then knows. The entries go into
the cache of this machine, and the search, which is the same as ever, finds them there. Keys say what a measurement
depends on (weights, data, the target of a time), so one that is not the search's own is never taken for it, and one
that did not arrive is made by the search itself.

Times are taken only where the target is this machine's, by one worker of a machine, and while no other works. Effects
are predicted for the candidates that those times leave, so on such machines too; the original is scored anywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rewriter.cache import remember
from rewriter.convert import load_target, read_calibration
from rewriter.errors import OptionError, brief
from rewriter.metrics import is_built_in
from rewriter.options import metric_of
from rewriter.session import rerouted
from rewriter.target import Target
from rewriter.tune.deadline import Deadline
from rewriter.tune.predict import sampled
from rewriter.tune.prepare import Prepared, prepared
from rewriter.tune.record import Progress
from rewriter.tune.request import Request
from rewriter.verdict import Limits

Entries = dict[tuple[str, str], Any]
"""By kind and place, as in the cache."""
Job = tuple[str, int]
"""What to measure, and which of them."""

_MOST_TRIES = 2
"""A measurement that ends two workers would end the others as well."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A search by names that every machine understands: the options of `rewriter tune`, checked."""

    target: str
    calibration: str
    length: int | None
    dtype: torch.dtype | None
    device: str
    metric: str | None
    goal: str
    variants: Sequence[str] | None
    limits: Limits
    seed: int
    folder: str = field(default_factory=os.getcwd)

    def prepared(self) -> list[Prepared]:
        """The model, captured, with its data, for each class of lengths. Names are looked up from the folder of whoever
        gave the order.
        """
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        loaded = load_target(self.target, length=self.length, dtype=self.dtype, device=self.device, seed=self.seed)
        batches, _ = read_calibration(self.calibration, loaded, self.length)
        request = Request(
            goal=self.goal,
            allowed=frozenset(self.variants) if self.variants is not None else None,
            inner="eager",
            dynamic=None,
            progress=lambda stage, done, total: None,
            limits=self.limits,
            metric=metric_of(self.metric),
            seed=self.seed,
            deadline=Deadline(None),
        )
        return prepared(loaded.model, batches, request)


class Worker:
    """One search, as far as it goes without deciding anything."""

    def __init__(self, order: Order, threads: int) -> None:
        torch.set_num_threads(threads)  # Ray gives it as many cores, and a time depends on them
        torch.manual_seed(order.seed)
        self._classes, self._device = order.prepared(), order.device
        kinds = {r.identity(): (at, r) for at in self._classes for r in at.tuning.slots.regions.values()}
        self._kinds = list(kinds.values())
        self._batches = [(at, batch) for at in self._classes for batch in (*at.search_part, *at.held_out)]
        self._effects = [(at, n) for at in self._classes for n in range(len(sampled(at.search_part)))]

    def about(self) -> tuple[str, dict[str, Any], dict[str, int]]:
        """Its machine, its target, and how many measurements there are of each kind."""
        at = self._classes[0]
        kept = is_built_in(at.metric)
        counts = {
            "site": len(self._kinds),
            "original": len(self._batches) if kept else 0,
            "effects": len(self._effects) if kept and at.request.max_drop > 0 else 0,
        }
        return socket.gethostname(), Target.current(self._device).to_json(), counts

    def measured(self, job: Job, known: Entries) -> Entries:
        """What a measurement adds. `known` are the times of all sites, where effects are asked for."""
        kind, number = job
        if kind == "site":
            return self._site(number)
        return self._original(number) if kind == "original" else self._effect(number, known)

    def _site(self, number: int) -> Entries:
        at, region = self._kinds[number]
        workbench = at.tuning.workbench
        workbench.choices(region, float("inf"))
        return workbench.ledger(self._device).known

    def _original(self, number: int) -> Entries:
        at, batch = self._batches[number]
        scores = at.scores_on([batch])
        scores.original()
        return scores.ledger.known

    def _effect(self, number: int, known: Entries) -> Entries:
        at, sample = self._effects[number]
        tuning = at.tuning
        tuning.workbench.ledger(self._device).known.update(known)
        tuning.measure_sites()
        predictor = tuning.predictor()
        if any(c.variant.fidelity == "learned" for choices in tuning.choices.values() for c in choices.others):
            return {}  # they are fitted first, which is no measurement
        with rerouted(tuning.model, at.through_slots):
            predictor.measured(at.metric, sampled(at.search_part)[sample], at.request.seed, sample)
        return predictor.ledger.known


@dataclass
class Spread:
    """What came of it."""

    measured: int = 0
    workers: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "; ".join([f"{self.measured} measurements came from {self.workers} workers of the cluster", *self.notes])


def measure_ahead(address: str, order: Order, deadline: Deadline, progress: Progress) -> Spread:
    """Fill the cache from a running cluster. Raises OptionError where there is none, or no worker can be used."""
    with _connected(address) as ray:
        return _Cluster(ray, order, deadline, progress).run()


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise OptionError("--ray needs Ray: pip install 'rewriter[ray]'") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="rewriter")
    except Exception as error:
        raise OptionError(f"no Ray cluster answers at {address!r} ({brief(error)}): see `ray status`") from error
    try:
        yield ray
    finally:
        ray.shutdown()  # ends the workers too, which belong to this connection


class _Cluster:
    """The workers of one search."""

    def __init__(self, ray: Any, order: Order, deadline: Deadline, progress: Progress) -> None:
        self._ray, self._deadline, self._progress = ray, deadline, progress
        self._target = Target.current(order.device)
        self._result, self._alive = Spread(), dict[Any, tuple[str, dict[str, Any]]]()
        self._counts: dict[str, int] = {}
        for worker in self._started(order):
            self._ask(worker)
        self._result.workers = len(self._alive)
        if not self._alive:
            why = "; ".join(dict.fromkeys(self._result.notes)) or "no node has the cores or the GPU"
            raise OptionError(f"no worker of the cluster can be used: {why}")

    def _started(self, order: Order) -> list[Any]:
        """One a node, with as many cores as are used here where it has them."""
        strategy = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        found = []
        for node in self._ray.nodes():
            cores = min(int(node["Resources"].get("CPU", 0)), self._target.threads) if node["Alive"] else 0
            gpus = 1 if order.device.startswith("cuda") else 0
            if not cores or node["Resources"].get("GPU", 0) < gpus:
                continue
            placed = strategy(node["NodeID"], soft=False)
            options = {"num_cpus": cores, "num_gpus": gpus, "scheduling_strategy": placed, "max_restarts": 0}
            found.append(self._ray.remote(Worker).options(**options).remote(order, cores))
        return found

    def _ask(self, worker: Any) -> None:
        try:
            left = None if self._deadline.left == float("inf") else max(self._deadline.left, 0.0)
            host, target, self._counts = self._ray.get(worker.about.remote(), timeout=left)
        except self._ray.exceptions.RayError as error:  # the traceback there, which ends with what was raised
            self._result.notes.append(f"a worker did not start: {str(error).strip().splitlines()[-1]}")
        else:
            self._alive[worker] = (host, target)

    def run(self) -> Spread:
        """Times first, then what may run side by side."""
        same = [worker for worker, (_, target) in self._alive.items() if target == self._target.to_json()]
        one_a_machine = {self._alive[worker][0]: worker for worker in same}
        if not same:
            self._result.notes.append("none is of the kind of this machine, so times are taken here")
        times = self._spread(self._jobs("site"), list(one_a_machine.values()), {})
        self._spread(self._jobs("original"), list(self._alive), {})
        if len(times) == self._counts["site"]:
            self._spread(self._jobs("effects"), [worker for worker in same if worker in self._alive], times)
        return self._result

    def _jobs(self, kind: str) -> list[Job]:
        return [(kind, number) for number in range(self._counts[kind])]

    def _spread(self, jobs: list[Job], free: list[Any], known: Entries) -> Entries:
        """The entries of the jobs that some worker did, remembered as they come. One that is lost goes to the others;
        what nobody can do is left to the search.
        """
        left, tries, running, found = deque(jobs), dict.fromkeys(jobs, 0), dict[Any, tuple[Any, Job]](), Entries()
        errors = self._ray.exceptions
        while True:
            while left and free:
                worker, job = free.pop(), left.popleft()
                running[worker.measured.remote(job, known)] = (worker, job)
            if not running or self._deadline.over():
                return found
            self._progress("measure on the cluster", len(jobs) - len(left) - len(running), len(jobs))
            timeout = None if self._deadline.left == float("inf") else self._deadline.left
            for ready in self._ray.wait(list(running), timeout=timeout)[0]:
                worker, job = running.pop(ready)
                try:
                    entries = self._ray.get(ready)
                except errors.RayTaskError as error:
                    self._result.notes.append(f"a measurement failed there: {brief(error.cause)}")
                    free.append(worker)
                except errors.RayError:
                    self._alive.pop(worker, None)
                    self._result.notes.append("a worker was lost")
                    tries[job] += 1
                    if tries[job] < _MOST_TRIES:
                        left.append(job)
                else:
                    free.append(worker)
                    self._result.measured += 1
                    found |= entries
                    for (kind, place), value in entries.items():
                        remember(kind, place, value)
