"""A small systemctl for tests where no systemd runs: ``daemon-reload``, ``enable --now``, ``start``, ``stop``.

Units are checked by ``systemd-analyze verify``. Starting runs ``ExecStart`` in an environment as bare as systemd's and
waits for ``READY=1`` on the notification socket; stopping runs ``ExecStop`` and waits for the process to end.
"""

from __future__ import annotations

import configparser
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
STATE = Path("/mnt/.units")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
SECONDS = 60


def service(name: str) -> configparser.SectionProxy:
    subprocess.run(["systemd-analyze", "verify", UNITS / name], check=True)
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(UNITS / name)
    return parser["Service"]


def start(name: str) -> None:
    settings = service(name)
    assert settings["Type"] == "notify"
    address = STATE / f"{name}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(address))
        listening.settimeout(SECONDS)
        process = subprocess.Popen(
            shlex.split(settings["ExecStart"]),
            env=ENVIRONMENT | {"NOTIFY_SOCKET": str(address)},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert "READY=1" in listening.recv(4096).decode()
    address.unlink()
    (STATE / name).write_text(str(process.pid))


def stop(name: str) -> None:
    pid = int((STATE / name).read_text())
    command = shlex.split(service(name)["ExecStop"].replace("$MAINPID", str(pid)))
    subprocess.run(command, env=ENVIRONMENT, cwd="/", check=True)
    deadline = time.monotonic() + SECONDS
    while _runs(pid):
        assert time.monotonic() < deadline, "the process goes on"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def main() -> None:
    STATE.mkdir(exist_ok=True)
    match sys.argv[1:]:
        case ["daemon-reload"]:
            return
        case ["enable", "--now", name] | ["start", name]:
            start(name)
        case ["stop", name] | ["disable", "--now", name]:
            stop(name)
        case other:
            raise SystemExit(f"not known here: {other}")


main()
