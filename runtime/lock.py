"""Two runs never write to one folder."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.settings import Settings

NAME = ".lock"


class FolderLock:
    """Context manager that holds a run's folder. The kernel lets go when the process ends, however it ends.

    Args:
        folder: of the run; made where it is not there.
        held: False does nothing: of several processes of a run the first holds the folder for all.

    Raises:
        ValueError: on entering; another process holds it.
    """

    def __init__(self, folder: Path, held: bool = True) -> None:
        self.path, self.held, self._handle = folder / NAME, held, -1

    @classmethod
    def of(cls, settings: Settings) -> FolderLock:
        """The lock of a run; its first process holds it."""
        first = int(os.environ.get("RANK", "0")) == 0
        return cls(Path(str(settings.run_dir)), first)

    def __enter__(self) -> FolderLock:
        if not self.held:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise ValueError(
                f"run_dir={self.path.parent} is in use by {who}; wait for it to end, or choose another run_dir"
            ) from None
        except OSError as error:  # a file system without locks, such as some of a network's
            warnings.warn(f"run_dir={self.path.parent} cannot be locked ({error}): see that no other run uses it")
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
