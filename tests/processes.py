"""Processes that are alive, from /proc: who outlived whom."""

from __future__ import annotations

from pathlib import Path

PARENT, SESSION = 1, 3  # fields of /proc/PID/stat behind the command's name


def fields_of(pid: int | str) -> list[str] | None:
    """State, parent, group, session, …; None if the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields


def processes(field: int, wanted: int) -> list[int]:
    """Those whose parent, or session, is `wanted`."""
    pids = [path.name for path in Path("/proc").glob("[0-9]*")]
    return [int(p) for p in pids if (f := fields_of(p)) and int(f[field]) == wanted]
