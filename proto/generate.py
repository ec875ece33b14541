"""Generate client/sessionstore/v1 from proto/, with the oldest grpcio-tools that the SDK supports.

    python proto/generate.py            write the generated code
    python proto/generate.py --check    exit 1, naming the files, if the committed code is stale

Generated code refuses to run on a runtime older than its generator, so the generator's version is the SDK's
floor: grpcio >= 1.74 and protobuf >= 6.31.1. The generator needs an older protobuf than the project's
environment has, so it lives in an environment of its own, `.venv-proto` (made on first use).
"""

import filecmp
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
COMMITTED = ROOT / "client/sessionstore/v1"
REQUIREMENTS = ["grpcio-tools==1.74.0", "mypy-protobuf==3.6.0", "setuptools==80.9.0",
                "grpcio==1.74.0", "protobuf==6.33.6", "types-protobuf==6.30.2.20250914"]
PROTOS = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))


def generator() -> Path:
    """The Python of the generator's environment, made if it is missing or of other versions."""
    home = ROOT / ".venv-proto"
    stamp = home / "requirements"
    wanted = "\n".join(REQUIREMENTS)
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin" / "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return home / "bin" / "python"


def generate(out: Path) -> None:
    """Write the generated code of every proto below `out`."""
    python = generator()
    names = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    plugins = [f"--plugin={name}={python.parent / name}" for name in names]
    outs = [f"--python_out={out}", f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"]
    protoc: list[str | Path] = [python, "-m", "grpc_tools.protoc", "-I", PROTO]
    subprocess.run([*protoc, *plugins, *outs, *PROTOS], cwd=ROOT, check=True)
    for pattern in ("errors_pb2_grpc.py*", "session_pb2_grpc.py*"):  # no service in these
        for path in out.rglob(pattern):
            path.unlink()


def stale() -> list[str]:
    """The names of committed files that are missing, left over, or not what proto/ generates."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / "sessionstore/v1"
        names = {path.name for path in fresh.iterdir()} | {path.name for path in COMMITTED.glob("*_pb2*")}
        _, different, missing = filecmp.cmpfiles(fresh, COMMITTED, sorted(names), shallow=False)
    return different + missing


def main() -> int:
    """Generate, or check."""
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not sys.argv[1:]:
        generate(ROOT / "client")
        return 0
    names = stale()
    for name in names:
        print(f"client/sessionstore/v1/{name} is not what proto/ generates: make generate", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
