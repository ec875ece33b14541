"""Engines by name or URL. Each is imported only when it is asked for."""

from pathlib import Path

from sessionstored.config import Config
from sessionstored.engine import Engine, StartError


async def open_engine(config: Config, *, accept_loss: bool = False) -> Engine:
    """Open the store that the daemon serves.

    Args:
        config: every setting; `store` is "jsonl" or "memory", with or without a colon behind it.
        accept_loss: go on although the store says that acknowledged changes are lost.

    Raises:
        StartError: there is no such engine, or it cannot open its store.

    """
    scheme, _, rest = config.store.partition(":")
    if rest.strip("/"):
        raise StartError(f"--store {config.store} names a place; the directory is given with --data")
    match scheme:
        case "jsonl":
            return await _open_jsonl(config, accept_loss)
        case "memory":
            from sessionstored.engine.memory import MemoryEngine

            return MemoryEngine(config.limits(), feed_limits=config.feed_limits())
    raise StartError(f"--store {config.store}: there is no such engine; there are jsonl and memory")


async def _open_jsonl(config: Config, accept_loss: bool) -> Engine:
    from sessionstored.engine.jsonl import Tuning, open_jsonl

    tuning = Tuning(
        cache_bytes_max=config.cache_bytes_max,
        queue_bytes_max=config.queue_bytes_max,
        queue_requests_max=config.queue_mutations_max,
        group_requests_max=config.group_mutations_max,
        group_bytes_max=config.group_bytes_max,
        backlog_bytes=config.backlog_bytes_max // 8,
        backlog_bytes_max=config.backlog_bytes_max,
        reserve_bytes=config.reserve_bytes_min,
        checkpoint_interval_s=config.checkpoint_s_max,
        scrub_bytes_per_s_max=config.scrub_bytes_per_s_max,
        scrub_interval_s=config.scrub_interval_s_min,
        feed=config.feed_limits(),
    )
    return await open_jsonl(
        Path(config.data),
        durability=config.durability,
        limits=config.limits(),
        tuning=tuning,
        accept_loss=accept_loss,
    )
