"""Runs side by side, each in a process with one thread: on this machine, or on a Ray cluster."""

import multiprocessing
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from morphgraph.errors import MorphError, MorphWarning, UnsupportedError
from morphgraph.graph import ChannelGraph, LiftOptions
from morphgraph.onnx_io import as_model, escape
from morphgraph.ops.custom import load_ops
from morphgraph.passes.lift import lift
from morphgraph.recipes.data import Dataset
from morphgraph.recipes.results import Result
from morphgraph.recipes.run import run
from morphgraph.recipes.settings import Settings


@dataclass(frozen=True)
class Task:
    """What all runs have in common, as another process may be given it.

    Attributes:
        model: a serialized ONNX model.
        options: how it is lifted.
        dataset: the images.
        ops: Python files that teach operators.
    """

    model: bytes
    options: LiftOptions
    dataset: Dataset
    ops: tuple[str, ...] = ()

    @classmethod
    def of(cls, graph: ChannelGraph, dataset: Dataset, ops: tuple[str, ...] = ()) -> "Task":
        """A lifted model as a task."""
        model = ir.external_data.load_to_model(graph.model.clone())
        return cls(ir.to_proto(model).SerializeToString(), graph.options, dataset, ops)

    def graph(self) -> ChannelGraph:
        """The model, lifted; what is to be said about it was said when it was lifted first."""
        for path in self.ops:
            load_ops(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MorphWarning)
            model = as_model(onnx.load_from_string(self.model))
            return lift(model, **self.options.arguments())


@dataclass(frozen=True)
class Job:
    """One run of a task, and the folder that it writes to."""

    settings: Settings
    folder: str


Outcome = Result | MorphError
Jobs = Mapping[str, Job]


def work(task: Task, job: Job) -> Outcome:
    """Do or resume a run; returns its result, or the ``MorphError`` that ended it."""
    torch.set_num_threads(1)
    try:
        return run(task.graph(), task.dataset, job.settings, Path(job.folder), resume=True)
    except MorphError as error:
        return error


def on_this_machine(task: Task, jobs: Jobs, processes: int) -> Iterator[tuple[str, Outcome]]:
    """Run jobs in ``processes`` processes; yields their names and outcomes as they are done.

    Each process has one GPU, if there are any.

    Raises:
        UnsupportedError: a process was killed.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in range(processes):
        places.put(place)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), context, initializer=_begin, initargs=(task, places)
    )
    try:
        names = {pool.submit(_next, job): name for name, job in jobs.items()}
        yield from _as_done(names)
    except BrokenProcessPool:
        raise UnsupportedError(
            "a process of the sweep was killed, perhaps for want of memory; the same command goes "
            "on, with fewer --jobs if so"
        ) from None
    finally:
        # After an error or an interrupt the other runs are not needed; they can be resumed.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


def _as_done(names: Mapping["Future[Outcome]", str]) -> Iterator[tuple[str, Outcome]]:
    for done in as_completed(names):
        yield names[done], done.result()


_task: Task  # of this process, sent once and not with every job


def _begin(task: Task, places: "multiprocessing.Queue[int]") -> None:
    """Make ready a process of :func:`on_this_machine`."""
    global _task
    _task = task
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(places.get() % torch.cuda.device_count())


def _end_with_parent() -> None:
    """Exit with the parent: an orphaned run would write to the folder that the next one resumes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _next(job: Job) -> Outcome:
    return work(_task, job)


def on_ray(task: Task, jobs: Jobs, address: str, processes: int) -> Iterator[tuple[str, Outcome]]:
    """The same on a Ray cluster, which must see the folders and have morphgraph installed.

    Args:
        task, jobs: what is to be done.
        address: as for ``ray.init``; ``"local"`` starts an instance on this machine.
        processes: of a local instance; a cluster runs as many jobs as it has room for.

    Raises:
        UnsupportedError: ray is not installed, there is no cluster, or it lost a job.
    """
    if not jobs:
        return
    with _cluster(address, processes) as ray:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(_on_ray)
        shared = ray.put(task)
        names = {remote.remote(shared, job): name for name, job in jobs.items()}
        while names:
            (done,), _ = ray.wait(list(names))
            try:
                yield names.pop(done), ray.get(done)
            except ray.exceptions.RayError as error:
                first = str(error).strip().splitlines()[0]
                raise UnsupportedError(
                    f"ray lost a run ({escape(first)}); the same command goes on"
                ) from error


def _on_ray(task: Task, job: Job) -> Outcome:
    """Ray's copies of arrays are shared and cannot be written to, which PyTorch warns of."""
    own = task.dataset
    for name in ("x_train", "y_train", "x_test", "y_test"):
        own = replace(own, **{name: np.array(getattr(own, name))})  # type: ignore[arg-type]
    return work(replace(task, dataset=own), job)


def _require_listening(address: str) -> None:
    """Raise an OSError where no server listens: Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _cluster(address: str, processes: int) -> Iterator[Any]:
    """A connection to Ray, ended where it was begun here."""
    try:
        import ray
    except ImportError:
        raise UnsupportedError(
            "--ray needs the package ray; install it with: pip install 'morphgraph[ray]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"num_cpus": processes, "include_dashboard": False}
    try:
        _require_listening(address)
        ray.init(address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"no Ray cluster at '{escape(address)}' ({escape(str(error))[:200]}); start one, or "
            "use --ray local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
