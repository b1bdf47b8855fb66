"""What `/metrics` says about deployments: replicas, queue, cache and speed, by deployment, model and addon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest

if TYPE_CHECKING:
    from trainer.serve.fleet import Fleet

GAUGES: Final = {
    "replicas_ready": "Replicas that take requests",
    "replicas_wanted": "Replicas that are wanted",
    "queue_depth": "Sequences that wait for a replica or in an engine",
    "batch_size": "Sequences that are continued in one step, over all replicas",
    "kv_cache_used_fraction": "Pages of the cache in use",
    "continued_streams": "Streams that went on elsewhere after their replica was lost",
}


async def exposition(fleet: Fleet) -> str:
    """All metrics in Prometheus's text format."""
    registry = CollectorRegistry()
    gauges = {name: Gauge(f"trainer_{name}", text, ["deployment"], registry=registry) for name, text in GAUGES.items()}
    cold = Gauge("trainer_cold_start_seconds", "Last cold start", ["deployment", "part"], registry=registry)
    engine = Gauge("trainer_engine", "Counters of the engines", ["deployment", "counter"], registry=registry)
    texts = [generate_latest(fleet.registry).decode()]
    for name, live in list(fleet.live.items()):
        pool = live.version.pool
        stats: dict[str, Any] = await pool.ask("stats")
        pages = stats.get("pages", 0)
        values = {
            "replicas_ready": live.num_ready,
            "replicas_wanted": live.wanted,
            "queue_depth": pool.num_waiting + stats.get("waiting", 0),
            "batch_size": stats.get("running", 0),
            "kv_cache_used_fraction": stats.get("pages_used", 0) / pages if pages else 0.0,
            "continued_streams": pool.num_continued,
        }
        for key, value in values.items():
            gauges[key].labels(name).set(value)
        for part, seconds in live.cold_start.items():
            cold.labels(name, part).set(seconds)
        for key, value in stats.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                engine.labels(name, key).set(value)
    texts.append(generate_latest(registry).decode())
    return "".join(texts)
