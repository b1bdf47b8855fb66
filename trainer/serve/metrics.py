"""What `/metrics` says: requests by model and addon; replicas, queue, cache and cold starts by deployment; devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from trainer.serve.fleet import Fleet

LABELS: Final = ("deployment", "model", "addon")
FIRST_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
TOKEN_S: Final = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
GAUGES: Final = {
    "queue_depth": "Sequences that wait for a replica or in an engine",
    "batch_size": "Sequences that are continued in one step, over all replicas",
    "kv_cache_used_fraction": "Pages of the cache in use",
    "replicas_ready": "Replicas that take requests",
    "replicas_wanted": "Replicas that are wanted",
    "continued_streams": "Streams that went on elsewhere after their replica was lost",
}


@final
class RequestMetrics:
    """Counters of requests, by deployment, model and addon."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register them.

        Args:
            registry: of the server.
        """
        self.first_s = Histogram(
            "trainer_time_to_first_token_seconds", "From arrival", LABELS, buckets=FIRST_S, registry=registry
        )
        self.token_s = Histogram(
            "trainer_time_per_output_token_seconds", "Mean of a request", LABELS, buckets=TOKEN_S, registry=registry
        )
        self.wait_s = Histogram(
            "trainer_queue_wait_seconds",
            "For a replica to be ready",
            ["deployment"],
            buckets=FIRST_S,
            registry=registry,
        )
        self.prompt = Counter("trainer_prompt_tokens", "Tokens of prompts", LABELS, registry=registry)
        self.cached = Counter("trainer_cached_prompt_tokens", "Of them, found in the cache", LABELS, registry=registry)
        self.output = Counter("trainer_output_tokens", "Tokens that were drawn", LABELS, registry=registry)
        self.errors = Counter("trainer_request_errors", "Requests that ended with an error", LABELS, registry=registry)
        self.left = Counter("trainer_requests_left", "Requests whose client left", LABELS, registry=registry)


@final
@dataclass(frozen=True)
class EngineView:
    """One model's engines, as they are now."""

    deployment: str
    stats: Mapping[str, Any]
    """Of the engine, summed over replicas."""
    pids: tuple[int, ...]
    num_waiting: int = 0
    """For a replica."""
    ready: int = 1
    wanted: int = 1
    continued: int = 0
    cold_start: Mapping[str, float] | None = None


def engine_lines(views: Iterable[EngineView]) -> str:
    """Gauges of engines and devices in Prometheus's text format."""
    registry = CollectorRegistry()
    gauges = {name: Gauge(f"trainer_{name}", text, ["deployment"], registry=registry) for name, text in GAUGES.items()}
    cold = Gauge("trainer_cold_start_seconds", "Last cold start", ["deployment", "part"], registry=registry)
    memory = Gauge("trainer_engine_memory_bytes", "Resident memory of engines", ["deployment"], registry=registry)
    cpu = Gauge("trainer_engine_cpu_seconds", "CPU time of living engines", ["deployment"], registry=registry)
    counters = Gauge("trainer_engine_counter", "As engines count", ["deployment", "counter"], registry=registry)
    for view in views:
        pages = view.stats.get("pages", 0)
        values = {
            "queue_depth": view.num_waiting + view.stats.get("waiting", 0),
            "batch_size": view.stats.get("running", 0),
            "kv_cache_used_fraction": view.stats.get("pages_used", 0) / pages if pages else 0.0,
            "replicas_ready": view.ready,
            "replicas_wanted": view.wanted,
            "continued_streams": view.continued,
        }
        for name, value in values.items():
            gauges[name].labels(view.deployment).set(value)
        for part, seconds in (view.cold_start or {}).items():
            cold.labels(view.deployment, part).set(seconds)
        for name, value in view.stats.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                counters.labels(view.deployment, name).set(value)
        used = [_process(pid) for pid in view.pids] or [
            (view.stats.get("memory_bytes", 0), view.stats.get("cpu_ms", 0) / 1000)  # on other machines, too
        ]
        memory.labels(view.deployment).set(sum(each[0] for each in used))
        cpu.labels(view.deployment).set(sum(each[1] for each in used))
    _devices(registry)
    return generate_latest(registry).decode()


def engine_pids() -> tuple[int, ...]:
    """Processes that this one started: its engines."""
    return tuple(child.pid for child in psutil.Process().children())


def _process(pid: int) -> tuple[int, float]:
    """Resident bytes and CPU seconds; nothing of a process that ended."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return process.memory_info().rss, times.user + times.system
    except psutil.Error:
        return 0, 0.0


def _devices(registry: CollectorRegistry) -> None:
    """Use and memory of GPUs, where NVML finds some."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    use = Gauge("trainer_device_use_fraction", "Of the last second", ["device"], registry=registry)
    used = Gauge("trainer_device_memory_used_bytes", "Memory in use", ["device"], registry=registry)
    total = Gauge("trainer_device_memory_bytes", "Memory", ["device"], registry=registry)
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            use.labels(str(index)).set(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            used.labels(str(index)).set(memory.used)
            total.labels(str(index)).set(memory.total)
    finally:
        pynvml.nvmlShutdown()


async def exposition(fleet: Fleet) -> str:
    """All metrics of a fleet in Prometheus's text format."""
    views = []
    for name, live in list(fleet.live.items()):
        pool = live.version.pool
        stats = await pool.ask("stats")
        views.append(
            EngineView(
                deployment=name,
                stats=stats,
                pids=(),
                num_waiting=pool.num_waiting,
                ready=live.num_ready,
                wanted=live.wanted,
                continued=pool.num_continued,
                cold_start=live.cold_start,
            )
        )
    return generate_latest(fleet.metrics.registry).decode() + engine_lines(views)
