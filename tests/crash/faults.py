"""A journal that fails at one chosen step, by an SQLite VFS."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import apsw


@dataclass
class Plan:
    """Fail with EIO at step `at`, and unless `once` is set at every step after it; 0 never fails.

    `error` is what the journal fails with.
    """

    at: int = 0
    once: bool = False
    error: type[apsw.Error] = apsw.IOError
    steps: list[str] = field(default_factory=list)
    armed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, what: str) -> bool:
        """Count a step; whether it fails."""
        with self.lock:
            if not self.armed:
                return False
            self.steps.append(what)
            return self.at == len(self.steps) or (not self.once and 0 < self.at < len(self.steps))

    @property
    def failed(self) -> str:
        """What failed first."""
        return self.steps[self.at - 1] if 0 < self.at <= len(self.steps) else ""


class _File(apsw.VFSFile):
    def __init__(self, name: object, flags: list[int], plan: Plan) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._kind = "log" if path.endswith("-wal") else "database"
        self._plan = plan
        super().__init__("", name, flags)  # type: ignore[arg-type]

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._plan.step(f"{self._kind} write"):
            super().xWrite(data[: len(data) // 2], offset)
            raise self._plan.error("injected: write")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        if self._plan.step(f"{self._kind} sync"):
            raise self._plan.error("injected: sync")
        super().xSync(flags)

    def xTruncate(self, size: int) -> None:
        if self._plan.step(f"{self._kind} truncate"):
            raise self._plan.error("injected: truncate")
        super().xTruncate(size)


class _Vfs(apsw.VFS):
    def __init__(self, name: str, plan: Plan) -> None:
        self._plan = plan
        super().__init__(name, "")

    def xOpen(self, name: object, flags: list[int]) -> _File:  # type: ignore[override]
        return _File(name, flags, self._plan)


@contextmanager
def failing_vfs(plan: Plan) -> Iterator[str]:
    """The name of a VFS that fails as planned."""
    name = f"failing{id(plan)}"
    vfs = _Vfs(name, plan)
    try:
        yield name
    finally:
        vfs.unregister()
