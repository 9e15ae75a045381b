"""Connects to Ray and trains one stage on its workers. Ray is imported late: `--help` must not wait for it."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pipelines.child import stderr_on_failure
from pipelines.plan import Resources
from stdit.config import Config, validate
from stdit.console import echo
from stdit.cores import available_cores

# Ray itself looks every 5 s.
PREEMPTION_POLL_S = 2.0
# The object store holds paths, settings and rows of text, never pixels or latents.
_OBJECT_STORE_BYTES = 150_000_000


class StageFailed(RuntimeError):
    """A stage's training ended early: its worker's error, too many restarts, or its deadline."""


class RayLost(StageFailed):
    """Ray's own processes (the controller of the stage, a node) died, not the training. It can be started again."""


class StageStopped(Exception):
    """A stage was asked to stop and has written a checkpoint."""


def connect(num_cpus: int | None = None) -> Literal["joined", "started", "already"]:
    """Joins the cluster in RAY_ADDRESS (set inside a Ray job), else starts a local Ray for this process.

    A local Ray has no dashboard, serves this process alone and ends with it. `num_cpus`: its logical CPUs (default:
    those that this process may use). A second call does nothing. Returns which of the three applied.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The default of 2 s between health checks would dominate short stages.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Fatal errors of Ray's C++ side arrive as exceptions; its log lines only distract.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Workers stay in the driver's directory: the plan's relative paths are relative to it.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray

    if ray.is_initialized():
        return "already"
    with stderr_on_failure():  # It would announce RAY_BACKEND_LOG_LEVEL.
        return _init(ray.init, num_cpus)


def in_cluster() -> bool:
    """Whether a Ray is connected, or RAY_ADDRESS names one."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def _init(init: Callable[..., Any], num_cpus: int | None) -> Literal["joined", "started"]:
    # Workers' prints stay in Ray's log folder: the driver shows progress itself, and Ray's own harmless warnings
    # (its placement group cleaner looks for the dashboard) would bury it. Errors reach the driver as exceptions.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        init(address=address, **quiet)
        return "joined"
    _own_token()
    # A bare ray.init() would attach to whatever Ray runs on this machine.
    local: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    local["num_cpus"] = num_cpus or available_cores()
    try:
        init(**local, **quiet)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        disconnect()
        init(**local, **quiet)  # Ray waits for its node for 30 s, which a busy machine can exceed
    return "started"


def _own_token() -> None:
    """Gives a local Ray a token of its own, for this process and its children: Ray would else leave one in
    ~/.ray/auth_token, which every user of the machine could read."""
    configured = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    disabled = os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
    if not (configured or disabled or (Path.home() / ".ray" / "auth_token").exists()):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def disconnect() -> None:
    """Stops a local Ray, or disconnects from the cluster."""
    import ray

    ray.shutdown()


def environment(resources: Resources) -> dict[str, str]:
    """Environment variables of a training worker."""
    variables = {
        "OMP_NUM_THREADS": str(resources.threads),
        # The driver follows metrics.jsonl; a second progress bar in a log file helps nobody.
        "TQDM_DISABLE": "1",
    }
    if not resources.use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def check_capacity(resources: Resources) -> str | None:
    """A line of warning if the cluster can't hold this training now (an autoscaler may yet bring nodes), else None."""
    import ray

    available = ray.cluster_resources()
    least = resources.ranks[0]
    required = {"CPU": least * resources.threads, "GPU": least if resources.use_gpu else 0}
    short = [f"{available.get(k, 0):g} {k} of {n} required" for k, n in required.items() if available.get(k, 0) < n]
    if not short:
        return None
    limit = f"until the deadline of {resources.deadline_s} s" if resources.deadline_s else "for ever"
    return f"the cluster has {', '.join(short)}; without an autoscaler training will wait {limit}"


def train_rank(settings: Mapping[str, Any]) -> None:
    """One rank: runs in a Ray Train worker, which has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""
    folder = Path(settings["directory"])
    if folder.is_dir():  # The same machine or a shared disk; elsewhere the paths are absolute.
        os.chdir(folder)
    import ray.train

    from stdit.train import Stopped, train
    from stdit.training.stopping import Stop

    config = validate(settings["config"], Config, settings["name"])
    stop = Stop()
    if ray.train.get_context().get_world_rank() == 0:  # One rank is enough: they agree at every step.
        watch = threading.Thread(target=_watch_stop_file, args=(Path(settings["stop_file"]), stop.request), daemon=True)
        watch.start()
    threading.Thread(target=_watch_preemption, args=(stop.request_checkpoint,), daemon=True).start()

    try:
        # Nothing is reported to Ray Train: it would hold every rank for 2 s each time, and checkpoints are not its own.
        train(config, stop=stop)
    except Stopped:
        return


def _watch_stop_file(file: Path, request: Callable[[str], None]) -> None:
    while not file.exists():
        time.sleep(0.5)
    request(f"{file} is there")


def _watch_preemption(request: Callable[[], None]) -> None:
    """Asks for a checkpoint for each node that Ray says is about to be taken away, as spot machines are; training goes
    on until then, and Ray Train starts it again without counting that among its max_failures. On every rank: the
    question is a barrier of all."""
    import ray.train

    known: set[str] = set()
    while True:
        info = ray.train.get_preemption_info()
        if info is not None and (new := set(info.preempted_node_ids) - known):
            known |= new
            request()
        time.sleep(PREEMPTION_POLL_S)


def train_stage(config: Config, resources: Resources, storage: Path, tick: Callable[[], None]) -> None:
    """Trains one stage under Ray Train and waits for it. `tick` is called about twice a second meanwhile.

    Every rank runs `stdit.train.train`, whose checkpoints in the run directory are the truth: a worker that dies is
    restarted from there by Ray Train, and so is the stage by running the plan again. `storage`: where Ray Train keeps
    its own records, and the file that asks the ranks to stop. SIGTERM, SIGINT or SIGHUP: the ranks write a checkpoint
    first. Raises StageFailed, RayLost, StageStopped.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    file = storage.resolve() / f"{config.name}.stop"
    per_worker: dict[str, float] = {"CPU": resources.threads}
    if resources.use_gpu:
        per_worker["GPU"] = 1
    trainer = _trainer_class()(
        train_rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "directory": os.getcwd(),
            "name": f"stage {config.name}",
            "stop_file": str(file),
        },
        torch_config=_torch_config("nccl" if resources.use_gpu else "gloo"),
        scaling_config=ScalingConfig(**_workers(resources), use_gpu=resources.use_gpu, resources_per_worker=per_worker),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            worker_runtime_env={"env_vars": environment(resources)},
        ),
    )
    file.unlink(missing_ok=True)
    with _request_stop_on_signal(file):
        try:
            _wait(trainer.fit, config.name, resources.deadline_s, tick)
        except RayLost as lost:
            if file.exists():  # asked to stop, and not to be started again
                file.unlink()
                raise StageStopped(f"{lost}, while it was stopping; run the same command again to go on") from lost
            raise
    if file.exists():
        file.unlink()
        raise StageStopped(f"stage {config.name}: stopped with a checkpoint; run the same command again to go on")


def _torch_config(backend: str) -> Any:
    """Ray Train's TorchConfig. Where workers are on several nodes, gloo takes the interface of each node's address, as
    Ray knows it: by itself it takes that of the host's name, in /etc/hosts often loopback."""
    import ray.util
    from ray.train.torch import TorchConfig

    class NodesBackend(TorchConfig().backend_cls):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
                worker_group.execute(_use_node_interface)
            super().on_start(worker_group, backend_config)

    class NodesConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return NodesBackend

    return NodesConfig(backend=backend)


def _use_node_interface() -> None:
    import ray.util

    from stdit.training.distributed import use_interface_of

    use_interface_of(ray.util.get_node_ip_address())


def _workers(resources: Resources) -> dict[str, Any]:
    """Number of workers, as Ray Train's ScalingConfig takes it: with two numbers it is elastic."""
    workers = resources.workers
    if isinstance(workers, int):
        return {"num_workers": workers}
    return {"num_workers": (workers.min, workers.max), "elastic_resize_monitor_interval_s": workers.check_every_s}


def _trainer_class() -> Any:
    """TorchTrainer; in a local Ray without its PlacementGroupCleaner.

    It cleans up after a dead controller through the dashboard. A local Ray has no dashboard: the callback warns and
    delays the end of every stage by 12 s; and everything of a local Ray ends with this process anyway.
    """
    from ray.train.torch import TorchTrainer

    if "RAY_ADDRESS" in os.environ:
        return TorchTrainer

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            every = super()._create_default_callbacks()
            return [callback for callback in every if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTrainer


@contextmanager
def _request_stop_on_signal(file: Path) -> Iterator[None]:
    """While this lasts, the first SIGTERM, SIGINT or SIGHUP writes `file`; a second one ends the process as it would
    have."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def ask(number: int, _: object) -> None:
        restore()
        with suppress(OSError):  # a terminal that is gone
            echo("\nstopping after a checkpoint; once more to stop at once", file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()


def _wait(fit: Callable[[], Any], name: str, deadline_s: float | None, tick: Callable[[], None]) -> None:
    """Runs `fit` in a thread with a deadline: Ray Train itself retries for ever if a node is lost.

    At the deadline the thread is abandoned; the caller ends the process, which releases its resources in the cluster.
    """
    error: list[Exception] = []

    def run() -> None:
        try:
            fit()
        except Exception as e:  # Handed over to the waiting thread, whatever it is.
            error.append(e)

    thread = threading.Thread(target=run, name=f"fit-{name}", daemon=True)
    started = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        tick()
        if deadline_s is not None and time.monotonic() - started > deadline_s:
            raise StageFailed(
                f"stage {name}: not ended after its deadline of {deadline_s} s (resources.deadline_s); "
                "run the same command again to go on from the newest checkpoint"
            )
    if error:
        kind = StageFailed if hasattr(error[0], "worker_failures") else _kind(error[0])
        raise kind(f"stage {name}: {_cause(error[0])}") from error[0]


def _kind(error: Exception) -> type[StageFailed]:
    """RayLost for errors of Ray's core: of Ray Train's own, a worker's error is the cause."""
    from ray.exceptions import RayError, RayTaskError

    return RayLost if isinstance(error, RayError) and not isinstance(error, RayTaskError) else StageFailed


def _cause(error: Exception) -> str:
    """What a worker said, without Ray's traceback around it; of several, the one that is not a mere lost connection."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return str(error)
    lines = {rank: _last_line(failure) for rank, failure in sorted(failures.items())}
    lost = (
        "the connection to another rank ended",
        "Connection closed by peer",
        "Connection reset",
        "ActorDiedError",
        "unexpectedly",
    )
    own = {rank: line for rank, line in lines.items() if not any(mark in line for mark in lost)} or lines
    return "; ".join(f"rank {rank}: {line}" for rank, line in own.items())


def _last_line(error: Exception) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return text[-1] if text else repr(error)
