"""One writing process of a kill storm: appends small batches to shared sessions until it is told to stop.

python storm_writer.py ADDRESS WRITER LOG STOP SEED retry|leave

Every message carries the writer, its number, and its batch. What was acknowledged, and what stayed unknown,
goes line by line into LOG, which lies outside the store. With `retry`, a call without an answer is sent
again, the very same, until it has one; with `leave`, it stays unknown.
"""

import json
import os
import random
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import grpc
from sessionstore.v1 import session_pb2, session_store_pb2, session_store_pb2_grpc

KEYS = ("storm:a", "storm:b", "storm/c", "storm_a", "ключ")
CALL_TIMEOUT_S = 5.0
GIVE_UP_S = 120.0
TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN)


@dataclass
class StormWriter:
    address: str
    name: str
    log: int
    stop: Path
    rng: random.Random
    retry: bool

    def run(self) -> None:
        channel = self._connect()
        client_id, sequence, number = str(uuid.uuid4()), 0, 0
        while not self.stop.exists():
            sequence += 1
            count = self.rng.randint(1, 5)
            request = self._request(client_id, sequence, number, count)
            number += count
            deadline = time.monotonic() + GIVE_UP_S
            while True:
                try:
                    answer = session_store_pb2_grpc.SessionStoreStub(channel).AppendMessages(
                        request, timeout=CALL_TIMEOUT_S, wait_for_ready=self.retry
                    )
                except grpc.RpcError as error:
                    if error.code() not in TRANSIENT or time.monotonic() > deadline:
                        raise
                    if not self.retry:
                        self._note("unknown", request, number - count, count)
                        channel.close()
                        time.sleep(0.1)
                        channel = self._connect()
                        break
                    continue
                self._note("acknowledged", request, number - count, count, answer.first_index)
                break

    def _connect(self) -> grpc.Channel:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        return grpc.insecure_channel(self.address, options=options)

    def _request(
        self, client_id: str, sequence: int, number: int, count: int
    ) -> session_store_pb2.AppendMessagesRequest:
        messages = [
            {"role": "user", "w": self.name, "n": number + i, "batch": sequence, "i": i, "of": count,
             "pad": "x" * self.rng.randrange(200)}
            for i in range(count)
        ]  # fmt: skip
        call = session_pb2.CallIdentity(
            client_id=client_id, sequence=sequence, answered_through=sequence - 1 if self.retry else 0
        )
        block = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
        return session_store_pb2.AppendMessagesRequest(key=self.rng.choice(KEYS), call=call, messages=block)

    def _note(
        self,
        what: str,
        request: session_store_pb2.AppendMessagesRequest,
        number: int,
        count: int,
        first_index: int = -1,
    ) -> None:
        line = {"what": what, "key": request.key, "n": number, "count": count, "first_index": first_index}
        os.write(self.log, json.dumps(line).encode() + b"\n")


def main(address: str, name: str, log: str, stop: str, seed: str, variant: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    StormWriter(address, name, fd, Path(stop), random.Random(int(seed)), variant == "retry").run()


if __name__ == "__main__":
    main(*sys.argv[1:])
