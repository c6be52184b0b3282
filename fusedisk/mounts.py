"""The library for mounts: what ``fusedisk mount``, ``umount``, ``list``, ``attach`` and ``detach`` do, from Python.

Each function runs that command in a process of its own, since a mount is served by a daemon that outlives its caller.
Keyword arguments are the command's options by their names, with underscores. The last error sentence of the command is
raised as OptionError for wrong usage, as HostError otherwise; what it warns of is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Literal, NoReturn, TypedDict, TypeVar, Unpack, get_type_hints

import trio

from fusedisk.access import AccessOptions, ServingOptions
from fusedisk.api import Image, need_trio
from fusedisk.arguments import AnyPath, flag, mapping, path, paths, text
from fusedisk.core.errors import FusediskError, HostError, OptionError

log = logging.getLogger(__name__)

_EXIT_USAGE = 2

_Result = TypeVar("_Result")


class AttachOptions(AccessOptions, ServingOptions, total=False):
    """Options of :func:`mount` and :func:`attach`; see ``fusedisk attach --help``."""

    name: str
    low_latency: bool


class MountOptions(AttachOptions, total=False):
    """Options of :func:`mount`; see ``fusedisk mount --help``."""

    partitions: bool
    snapshots: bool
    growable: bool
    allow_other: Literal["off", "on", "auto"]
    uid: int | str
    gid: int | str
    mode: str


class DeviceOptions(AttachOptions, total=False):
    """Options of :func:`attach` alone; see ``fusedisk attach --help``."""

    sector_size: Literal[512, 4096]
    direct_io: Literal["auto", "on", "off"]


class LeaveOptions(TypedDict, total=False):
    """Options of :func:`umount` and :func:`detach`: ``wait`` until it is no longer in use, at most ``timeout`` seconds,
    or ``force`` the end although it is in use."""

    wait: bool
    timeout: float
    force: bool


@dataclasses.dataclass(frozen=True, slots=True)
class MountedFile:
    """One disk, partition or snapshot of a mount."""

    path: str
    image: str
    format: str
    size: int
    read_only: bool
    devices: tuple[str, ...]
    """The loop devices that stand on it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """What :func:`mount` and :func:`list` tell of a mount."""

    mountpoint: str
    state: str
    """``serving``, ``stale`` (its daemon has died), ``ending`` or ``failed``."""
    pid: int
    error: str | None
    device: str | None
    """The loop device that was attached together with it."""
    files: tuple[MountedFile, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Attachment:
    """What :func:`attach` tells of a loop device."""

    device: str
    partitions: tuple[str, ...]
    """The devices of its partitions."""
    mount: Mount


# --- the functions --------------------------------------------------------------------------------------


def mount(
    images: Image | Sequence[Image], mountpoint: AnyPath, **options: Unpack[MountOptions]
) -> AbstractAsyncContextManager[Mount]:
    """Mount an image, or each of a list of images, as flat raw files below ``mountpoint``:
    ``async with fusedisk.mount("vm.qcow2", "/mnt/disk") as mounted``.

    Leaving the block unmounts; where something still uses the mount, that raises and the mount stays.
    """
    return _Lasting("mount", mount_command(images, mountpoint, options), read_mount, unmount_command)


def attach(image: Image, **options: Unpack[DeviceOptions]) -> AbstractAsyncContextManager[Attachment]:
    """Attach an image to a loop device: ``async with fusedisk.attach("vm.qcow2") as attached``. Needs root.

    Leaving the block detaches; where something still uses the device, that raises and the device stays.
    """
    return _Lasting("attach", attach_command(image, options), read_attachment, detach_command)


async def umount(mountpoint: AnyPath, **options: Unpack[LeaveOptions]) -> None:
    """Unmount. On return everything is flushed, and the daemon has ended."""
    need_trio("umount")
    await run(leave_command("umount", mountpoint, options))


async def detach(device_or_image: AnyPath, **options: Unpack[LeaveOptions]) -> None:
    """Detach a loop device, or that of an image. On return everything is flushed, and the image is closed."""
    need_trio("detach")
    await run(leave_command("detach", device_or_image, options))


async def list() -> tuple[Mount, ...]:
    """What is mounted: for root everything, for others what is theirs."""
    need_trio("list")
    return read_list(await run(LIST_COMMAND))


class _Lasting(AbstractAsyncContextManager[_Result]):
    """What lasts from one command to another."""

    def __init__(
        self, name: str, begin: Command, read: Callable[[str], _Result], end: Callable[[_Result], Command]
    ) -> None:
        self._name, self._begin, self._read, self._end = name, begin, read, end
        self._result: _Result

    def __enter__(self) -> NoReturn:
        raise TypeError(
            f"fusedisk.{self._name}(...) needs 'async with', in a trio task; with a plain 'with' use "
            f"fusedisk.{self._name}_sync(...)."
        )

    def __exit__(self, *_: object) -> None:
        """Never called: Python looks for it before it calls ``__enter__``."""

    async def __aenter__(self) -> _Result:
        need_trio(self._name)
        with trio.CancelScope(shield=True):  # once begun, somebody must know what to end
            self._result = self._read(await run(self._begin))
        return self._result

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with keep_first(exc), trio.CancelScope(shield=True):
            await run(self._end(self._result))


@contextlib.contextmanager
def lasting_sync(
    begin: Command, read: Callable[[str], _Result], end: Callable[[_Result], Command]
) -> Iterator[_Result]:
    """The same for code outside trio."""
    result = read(run_sync(begin))
    try:
        yield result
    except BaseException as exc:
        with keep_first(exc):
            run_sync(end(result))
        raise
    run_sync(end(result))


@contextlib.contextmanager
def keep_first(exc: BaseException | None) -> Iterator[None]:
    """Let a failure at the end not hide the one before it."""
    try:
        yield
    except FusediskError as failure:
        if exc is None:
            raise
        exc.add_note(f"while leaving: {failure}")


# --- command lines --------------------------------------------------------------------------------------

Command = tuple[str, ...]
LIST_COMMAND: Command = ("list", "--output", "json")


def mount_command(images: Image | Sequence[Image], mountpoint: AnyPath, options: MountOptions) -> Command:
    """The command line of :func:`mount`."""
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    named = [_image(image) for image in images] if several else [_image(images)]  # type: ignore[arg-type, union-attr]
    return ("mount", "--output", "json", *_options(options), "--", *named, _path("mountpoint", mountpoint))


def attach_command(image: Image, options: DeviceOptions) -> Command:
    """The command line of :func:`attach`."""
    return ("attach", "--output", "json", *_options(options), "--", _image(image))


def unmount_command(mounted: Mount) -> Command:
    """The command line that ends a mount."""
    return ("umount", "--", mounted.mountpoint)


def detach_command(attached: Attachment) -> Command:
    """The command line that ends an attachment."""
    return ("detach", "--", attached.device)


def leave_command(name: str, place: AnyPath, options: LeaveOptions) -> Command:
    """The command line of :func:`umount` and :func:`detach`."""
    return (name, *_options(options), "--", _path("the place", place))


def _image(image: Image) -> str:
    if isinstance(image, Mapping):
        return json.dumps(mapping("the image", image))
    return text("the image", image) if isinstance(image, str) else _path("the image", image)


def _path(name: str, given: AnyPath) -> str:
    return os.path.abspath(path(name, given))


def _options(options: Mapping[str, Any]) -> Iterator[str]:
    """Words for options by name; None is as good as none."""
    for name, value in options.items():
        word = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        kind = _KINDS.get(name)
        if kind is None:
            raise TypeError(f"there is no option '{name}'.")
        if kind is bool:
            flag(name, value)
            yield word
        elif kind == Iterable[AnyPath]:
            for item in paths(name, value):
                yield f"{word}={os.path.abspath(item)}"
        elif kind == AnyPath:
            yield f"{word}={_path(name, value)}"
        elif isinstance(value, int | float):
            yield f"{word}={value}"
        else:
            yield f"{word}={text(name, value)}"


_KINDS = {**get_type_hints(MountOptions), **get_type_hints(DeviceOptions), **get_type_hints(LeaveOptions)}
"""The type of every option."""


# --- answers --------------------------------------------------------------------------------------------


def read_mount(answer: str) -> Mount:
    """The mount that a command tells of in JSON."""
    return _mount(json.loads(answer))


def read_attachment(answer: str) -> Attachment:
    """The same for ``fusedisk attach``."""
    found = json.loads(answer)
    return Attachment(found["loop-device"], tuple(found["partitions"]), _mount(found))


def read_list(answer: str) -> tuple[Mount, ...]:
    """The same for ``fusedisk list``."""
    return tuple(map(_mount, json.loads(answer)))


def _mount(found: dict[str, Any]) -> Mount:
    files = (
        MountedFile(
            file["path"],
            file["image"],
            file["format"],
            file["virtual-size"],
            file["read-only"],
            tuple(file["loop-devices"]),
        )
        for file in found["exports"]
    )
    return Mount(found["mountpoint"], found["state"], found["pid"], found["error"], found["loop-device"], tuple(files))


# --- processes ------------------------------------------------------------------------------------------


async def run(command: Command) -> str:
    """Run ``fusedisk`` in a process of its own; returns its output. Raises HostError or OptionError."""
    return _judged(await trio.run_process(_line(command), capture_stdout=True, capture_stderr=True, check=False))


def run_sync(command: Command) -> str:
    """The same for code outside trio."""
    return _judged(subprocess.run(_line(command), stdin=subprocess.DEVNULL, capture_output=True))


def _line(command: Command) -> Sequence[str]:
    """A command line that runs this very package, wherever it was imported from."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = "import sys; sys.path.append(sys.argv.pop(1)); from fusedisk.cli.entry import main; main()"
    return [sys.executable, "-P", "-c", program, here, *command]


def _judged(done: subprocess.CompletedProcess[bytes]) -> str:
    said = [line.removeprefix("fusedisk: ") for line in os.fsdecode(done.stderr).splitlines()]
    if done.returncode:
        said = [line for line in said if not line.startswith("Try '")]
        sentence = said.pop() if said else f"fusedisk ended with exit status {done.returncode}."
    for line in said:
        log.warning("%s", line)
    if done.returncode:
        raise OptionError(sentence) if done.returncode == _EXIT_USAGE else HostError(sentence)
    return os.fsdecode(done.stdout)
