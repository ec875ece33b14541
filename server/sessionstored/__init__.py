"""sessionstored: the daemon that owns a directory of conversation sessions, and serves it over gRPC.

The way of a call: `service` (check, engine, reply) -> `requests` (is it well formed?) -> `engine` (is it
right, is it durable?) -> `replies`, or `status` if it was refused. `cli`, `config` and `server` start and
stop it.

The daemon knows of the SDK only `v1`, `codec` and `history`.
"""
