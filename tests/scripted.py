"""A service that answers as it is told: for refusals that a healthy daemon does not give on demand."""

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyProto
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from sessionstore._operations import METHODS

Answer = Callable[[Any, grpc.ServicerContext], Any]


class Scripted:
    """One server on a port of its own.

    `script` holds what the next calls get, in order: a reply message, a list of them for a stream, an
    `Answer`, or a refusal made by `refuse`. An empty script gives empty replies. GetServerInfo, with which
    clients probe, gets its empty reply, or what `probe` gives; `probes` counts these calls. `requests` are
    the others, as they came.
    """

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests: list[Any] = []
        self.probe: Answer | None = None
        self.probes = 0
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        handlers = {method.name: self._handler(method) for method in METHODS}
        service = grpc.method_handlers_generic_handler("sessionstore.v1.SessionStore", handlers)
        self._server.add_generic_rpc_handlers((service,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait(5)

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            if method.name == "GetServerInfo":
                self.probes += 1
                return self.probe(request, context) if self.probe else method.reply()
            with self._lock:
                self.requests.append(request)
                step = self.script.pop(0) if self.script else method.reply()
            return step(request, context) if callable(step) else step

        def stream(request: Any, context: grpc.ServicerContext) -> Any:
            given = answer(request, context)
            yield from given if isinstance(given, list) else [given]

        def exchange(requests: Any, context: grpc.ServicerContext) -> Any:
            yield from stream(next(requests), context)

        serve: Any = (grpc.unary_unary_rpc_method_handler, answer)
        if method.streams:
            serve = (grpc.unary_stream_rpc_method_handler, stream)
        if method.sends:
            serve = (grpc.stream_stream_rpc_method_handler, exchange)
        make, behaviour = serve
        return make(
            behaviour,
            request_deserializer=method.request.FromString,
            response_serializer=method.reply.SerializeToString,
        )


def refuse(code: grpc.StatusCode, reason: str = "", **metadata: str) -> Answer:
    """A refusal; with an ErrorInfo of ours if it has a reason."""

    def answer(_: Any, context: grpc.ServicerContext) -> Any:
        if not reason:
            context.abort(code, "as told")
        detail = AnyProto()
        detail.Pack(
            error_details_pb2.ErrorInfo(reason=reason, domain="sessionstore.v1", metadata=metadata)
        )
        status = status_pb2.Status(code=code.value[0], message="as told", details=[detail])
        context.abort_with_status(rpc_status.to_status(status))

    return answer
