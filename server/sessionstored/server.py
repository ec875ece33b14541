"""The life of a daemon: open the store, bind, serve, drain, end.

The store is opened before anything is bound, so that a second daemon on the same directory is refused by name
and never takes an address. What ends a daemon: a signal (drain, close the store, 0), or a storage failure
(end at once, 3), because after a failed flush nothing that memory says about the disk is to be believed.
"""

import asyncio
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sessionstore.v1 import session_store_pb2_grpc

from sessionstored import address
from sessionstored.address import Address
from sessionstored.arrivals import Arrivals
from sessionstored.calls import Calls
from sessionstored.config import Config
from sessionstored.engine import Engine, StartError
from sessionstored.engine.open import open_engine
from sessionstored.lease_queue import LeaseQueue
from sessionstored.rules import Refusal
from sessionstored.service import LARGE_REPLIES, SERVICE, SessionStoreServicer

EXIT_OK = 0
EXIT_CANNOT_START = 1
EXIT_STORAGE_FAILED = 3
# A request up to this many times the largest batch is read, so that it can be refused by name.
_RECEIVED_BATCHES_MAX = 2
_MESSAGE_LENGTH_MAX = (1 << 31) - 1
_CALLS_MAX = (1 << 31) - 1
# What an acknowledgement is worth, and what is lost at worst.
_DURABILITY = {
    "fsync": "what is acknowledged survives kill -9 and power loss",
    "os": "what is acknowledged survives kill -9; a power loss may take the last seconds of it",
    "none": "what is acknowledged ends with this process",
}
# What still runs after the drain are streams without an end, such as a health watch.
_STREAMS_GRACE_S = 0.5
_FAILURE_ARRIVES_S = 0.02
# How long the end after a storage failure waits for calls under way, so that they hear what became of them.
_FAILURE_ANSWERED_S_MAX = 5.0
# How many requests may be on their way in, and how long one may take while others wait.
_BYTES_PER_ARRIVAL = 8 << 20
_ARRIVALS_MIN = 4
_ARRIVAL_S_MAX = 5.0
_LOOKAHEAD_BYTES = 128 << 10
# How long a stop waits for a store that is still being opened.
_OPENING_S_MAX = 2.0

_STOPPING = Refusal("SHUTTING_DOWN", "the daemon is stopping; watch again from your last cursor")

_log = logging.getLogger(__name__)


class _Stop(asyncio.Event):
    """Set once the daemon is to stop."""

    number = signal.SIGTERM
    """The signal that said so."""


async def serve(
    config: Config, ready: Callable[[Sequence[str]], None], *, accept_loss: bool = False
) -> int:
    """Serve until a signal or a storage failure.

    Args:
        config: every setting.
        ready: called once with the addresses, as soon as they answer.
        accept_loss: open a store although it says that acknowledged changes are lost.

    Returns:
        The exit code: EXIT_OK after a clean stop, or EXIT_STORAGE_FAILED.

    Raises:
        StartError: an address or the store cannot be had.

    """
    addresses = _allowed(config)
    _raise_descriptors()
    stop = _stop_on_signals()
    engine = await _opened(config, stop, accept_loss=accept_loss)
    daemon = _Daemon(config, engine)
    try:
        served = [daemon.bind(each) for each in addresses]
        engine.announce(served)
        await daemon.start()
        _log.info("serving %s on %s (pid %d)", engine.name, ", ".join(served), os.getpid())
        level = logging.INFO if engine.durability == "fsync" else logging.WARNING
        _log.log(level, "durability %s: %s", engine.durability, _DURABILITY[engine.durability])
        ready(served)
    except BaseException:
        await daemon.end()
        raise
    return await daemon.run(stop)


async def _opened(config: Config, stop: _Stop, *, accept_loss: bool) -> Engine:
    """The store. A stop that comes while it is opened waits for it a little, and then ends the process.

    That is as kill -9 is: recovery may take long, cannot be interrupted, and begins anew at the next start.
    """
    opening = asyncio.create_task(open_engine(config, accept_loss=accept_loss))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    await asyncio.wait((opening,), timeout=_OPENING_S_MAX)
    if not opening.done():
        _log.critical("stopped while the store was being opened: ending without a clean stop")
        os._exit(128 + stop.number)
    return opening.result()


def _allowed(config: Config) -> list[Address]:
    """The addresses to serve, each one allowed. Raises StartError."""
    addresses = [address.parse(text) for text in config.listen]
    for each in addresses:
        if each.path:
            continue
        if address.is_loopback(each):
            _log.warning("%s: anybody on this machine may read and write every session", each)
        elif config.insecure:
            _log.warning("%s: anybody who reaches it may read and write every session", each)
        else:
            raise StartError(
                f"--listen {each} is no loopback address, and there is no encryption and no authentication: "
                "--insecure serves it all the same"
            )
    return addresses


def _raise_descriptors() -> None:
    """Take as many file descriptors as this process may have: each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _connections_max(addresses: int) -> int:
    """How many connections each address may have: half of the descriptors are for the store and the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft // 2 // addresses)


def _stop_on_signals() -> _Stop:
    """An event that the first SIGTERM or SIGINT sets; the second one ends the process at once."""
    stop = _Stop()

    def handle(number: signal.Signals) -> None:
        if stop.is_set():
            _log.critical("%s again: ending without a clean stop", number.name)
            os._exit(128 + number)
        _log.info("%s: stopping", number.name)
        stop.number = number
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)
    return stop


class _Daemon:
    """One gRPC server over one engine."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        arrivals = Arrivals(
            places=max(_ARRIVALS_MIN, config.concurrent_bytes_max // _BYTES_PER_ARRIVAL),
            waiting_max=config.concurrent_calls_max,
            patience_s=_ARRIVAL_S_MAX,
        )
        self._calls = Calls(
            SERVICE,
            bytes_max=config.concurrent_bytes_max,
            calls_max=config.concurrent_calls_max,
            large_replies=LARGE_REPLIES,
            arrivals=arrivals,
        )
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[self._calls],
            options=_options(config),
            maximum_concurrent_rpcs=config.concurrent_calls_max + config.watchers_max,
        )
        self._leases = LeaseQueue(
            engine,
            waiters_max=min(config.lease_waiters_max, max(1, config.concurrent_calls_max // 2)),
            waiters_per_key_max=config.lease_waiters_per_session_max,
            bytes_max=config.concurrent_bytes_max // 4,
        )
        servicer = SessionStoreServicer(
            engine,
            self._leases,
            config.bounds(),
            config.limits(),
            config.feed_limits(),
            version=version("sessionstore"),
            start_time_us=time.time_ns() // 1000,
        )
        session_store_pb2_grpc.add_SessionStoreServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def bind(self, wanted: Address) -> str:
        """Bind an address, and give it as it is served. Raises StartError."""
        address.prepare(wanted)
        # The socket file gets its mode 0600 when it is made, so that nobody can connect in between.
        mask = os.umask(0o177) if wanted.path else None
        try:
            port = self._server.add_insecure_port(address.grpc_name(str(wanted)))
        except RuntimeError as error:
            raise StartError(
                f"--listen {wanted}: {address.why_not(wanted)}; choose another address with --listen"
            ) from error
        finally:
            if mask is not None:
                os.umask(mask)
        return str(wanted if wanted.path else Address(host=wanted.host, port=port))

    async def start(self) -> None:
        """Answer calls from now on."""
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def run(self, stop: _Stop) -> int:
        """Serve until told to stop, or until storage fails. Returns the exit code."""
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(self._engine.failed())
        await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        if not failing.done():
            await self._stop()
            # A failure while the store was closed comes from another thread, and takes a moment to arrive.
            await asyncio.wait((failing,), timeout=_FAILURE_ARRIVES_S)
        if not failing.done():
            failing.cancel()
            _log.info("stopped cleanly")
            return EXIT_OK
        _log.critical("storage failed, ending: %s", failing.exception() or failing.result())
        await self._health.enter_graceful_shutdown()
        self._leases.stop()
        self._engine.end_watches(_STOPPING)
        await self._calls.drain(_FAILURE_ANSWERED_S_MAX)  # or gRPC would cancel them, and they would not know
        await self._server.stop(_STREAMS_GRACE_S)
        return EXIT_STORAGE_FAILED

    async def end(self) -> None:
        """Let go of the addresses and of the store."""
        await self._server.stop(_STREAMS_GRACE_S)
        await self._engine.close()

    async def _stop(self) -> None:
        """Refuse new calls, wait for those under way, end streams, and make everything durable."""
        await self._health.enter_graceful_shutdown()
        self._leases.stop()
        self._calls.draining = True
        self._engine.end_watches(_STOPPING)
        left = await self._calls.drain(self._config.drain_s_max)
        if left:
            _log.warning("%d calls were still under way after %g s", left, self._config.drain_s_max)
        await self.end()


def _options(config: Config) -> list[tuple[str, int]]:
    length_max = _RECEIVED_BATCHES_MAX * (config.batch_bytes_max + config.metadata_bytes_max)
    return [
        # Two daemons on one port would each get a part of the calls.
        ("grpc.so_reuseport", 0),
        # Connections must not take the descriptors that the store needs: it would take that for its end.
        ("grpc.max_allowed_incoming_connections", _connections_max(len(config.listen))),
        ("grpc.max_receive_message_length", min(length_max, _MESSAGE_LENGTH_MAX)),
        # gRPC itself drops calls, without a reason, when 1,000 wait to be taken: that is for
        # concurrent_calls_max to say.
        ("grpc.server.max_pending_requests", _CALLS_MAX),
        ("grpc.server.max_pending_requests_hard_limit", _CALLS_MAX),
        # What arrives of a message before it is read is for Arrivals to bound: without these, gRPC takes in
        # megabytes of each.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _LOOKAHEAD_BYTES),
        # Idle agents hold connections for days: let them ask whether it still lives, and find out when they
        # are gone.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
