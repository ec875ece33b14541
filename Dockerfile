# The daemon in a container. It serves on a Unix socket in /run/sessionstore: share that directory with the agents'
# containers, which then need uid 10001.
#
#   docker build -t sessionstore .
#   docker run -v sessions:/var/lib/sessionstore -v socket:/run/sessionstore sessionstore
#
# Over TCP, which is neither encrypted nor authenticated, only inside a network that you trust:
#
#   docker run -v sessions:/var/lib/sessionstore -p 127.0.0.1:50051:50051 sessionstore \
#     serve --data /var/lib/sessionstore --listen unix:/run/sessionstore/sock --listen 0.0.0.0:50051 --insecure
#
# `docker stop` waits 10 s before it kills, and a drain takes at most that: give it `--stop-timeout 15`.

FROM python:3.11-slim AS builder
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY client client
COPY server server
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/sessionstore
RUN pip wheel --no-deps --wheel-dir dist .
RUN /opt/sessionstore/bin/pip install "$(echo dist/sessionstore-*.whl)[server,cli]"

FROM python:3.11-slim
RUN groupadd --gid 10001 sessionstore \
 && useradd --uid 10001 --gid sessionstore --home-dir /var/lib/sessionstore --no-create-home --shell /usr/sbin/nologin sessionstore \
 && install -d -o sessionstore -g sessionstore -m 0700 /var/lib/sessionstore /run/sessionstore
COPY --from=builder /opt/sessionstore /opt/sessionstore
# PATH finds the commands; SESSIONSTORE_TARGET is what `sessionstored health` and sessionctl ask inside the container.
ENV PATH=/opt/sessionstore/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SESSIONSTORE_TARGET=unix:/run/sessionstore/sock
USER 10001:10001
WORKDIR /var/lib/sessionstore
VOLUME ["/var/lib/sessionstore"]
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["sessionstored", "health"]
ENTRYPOINT ["sessionstored"]
CMD ["serve", "--data", "/var/lib/sessionstore", "--listen", "unix:/run/sessionstore/sock"]
