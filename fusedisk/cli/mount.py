"""``fusedisk mount``: images as flat raw files.

Nothing heavy is imported before the daemon has forked: the command itself only checks its options.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fusedisk.cli.image import complete_file, format_option, gate_options, need
from fusedisk.cli.output import output_option, print_json, tell
from fusedisk.cli.owner import group, user

if TYPE_CHECKING:
    from fusedisk.cli.daemon import MountRequest
    from fusedisk.core.errors import FusediskError
    from fusedisk.export.export import FileSettings
    from fusedisk.export.opening import OpenSettings
    from fusedisk.mount.settings import ServeSettings

    _Settings = TypeVar("_Settings", OpenSettings, FileSettings, ServeSettings)


def _check_images(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Name the missing argument. click takes a single one for MOUNTPOINT, but the user meant it as an IMAGE."""
    if not value and not ctx.resilient_parsing:
        need("MOUNTPOINT" if ctx.params.get("mountpoint") is not None else "IMAGE...", None)
    return value


@click.command(
    epilog="""\b
Examples:
  fusedisk mount vm.qcow2 /mnt/disk                 # /mnt/disk/vm is the disk
  fusedisk mount --read-only a.qcow2 b.raw /mnt/disks
  fusedisk mount --overlay vm.qcow2 /mnt/disk       # writes are thrown away at the end
  fusedisk mount --overlay-file try.qcow2 vm.qcow2 /mnt/disk
  fusedisk mount --partitions vm.qcow2 /mnt/disk    # /mnt/disk/vm.p1 is its first partition
  fusedisk mount --snapshots vm.qcow2 /mnt/disk     # /mnt/disk/vm@NAME is what it held once
  fusedisk mount --name data driver=raw,file.filename=disk.img,offset=1M /mnt/disk
  fusedisk mount vm.qcow2 disk.raw                  # on a regular file: that file is the disk

Then: losetup -fP --show /mnt/disk/vm, fdisk -l /mnt/disk/vm, fusedisk umount /mnt/disk"""
)
@click.argument("images", metavar="IMAGE...", nargs=-1, callback=_check_images, shell_complete=complete_file)
@click.argument("mountpoint", metavar="MOUNTPOINT", required=False, is_eager=True, shell_complete=complete_file)
@click.option("-r", "--read-only", is_flag=True, help="Open the images read-only; the files have no write permission.")
@click.option("--overlay", is_flag=True, help="Write to a throw-away layer; the image is never touched.")
@click.option(
    "--overlay-file",
    metavar="FILE",
    shell_complete=complete_file,
    help="Write to the qcow2 layer FILE; it is created if it is missing, and used again if it stands on IMAGE.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the file, for one image; with several, put 'name=NAME' among the options of each.",
)
@click.option("--partitions", is_flag=True, help="Show each partition as a file too: NAME.p1 and so on.")
@click.option("--snapshots", is_flag=True, help="Show each internal snapshot as a read-only file too: NAME@SNAPSHOT.")
@format_option("images")
@click.option(
    "--key-file",
    metavar="FILE",
    shell_complete=complete_file,
    help="File with the passphrase of encrypted images; - reads the first line of standard input.",
)
@click.option("--copy-on-read", is_flag=True, help="Keep in the top layer what was read from its backing file.")
@click.option(
    "--detect-zeroes",
    type=click.Choice(["off", "on", "unmap"]),
    default="off",
    show_default=True,
    help="Store zeroes that are written without taking space, where the format can; unmap: also give space back.",
)
@click.option(
    "--discard",
    type=click.Choice(["ignore", "unmap"]),
    default="unmap",
    show_default=True,
    help="unmap: discarded ranges give their space back.",
)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "writethrough", "none", "directsync", "unsafe"]),
    default="writeback",
    show_default=True,
    help="How writes reach the disk, as in QEMU.",
)
@click.option(
    "--kernel-cache",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Let the kernel cache a file if it learns of every change; off: it asks each time.",
)
@click.option(
    "--passthrough",
    type=click.Choice(["off", "auto", "on"]),
    default="auto",
    show_default=True,
    help="Let the kernel access a raw image's file directly (Linux 6.9, root). auto: only if a write past the end "
    "cannot grow the image, or --growable allows it.",
)
@click.option(
    "--channel",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Serve data by fusedisk's own FUSE loop; off: by pyfuse3, slower, without holes and discard.",
)
@click.option(
    "--low-latency",
    is_flag=True,
    help="Keep processors awake while requests follow each other (root).",
)
@click.option("--growable", is_flag=True, help="A write past the end makes the disk longer.")
@click.option(
    "--allow-other",
    type=click.Choice(["off", "on", "auto"]),
    default="auto",
    show_default=True,
    help="Let other users use the files, root included; auto: if the system permits it.",
)
@click.option("--uid", type=user, metavar="USER", help="Owner of the files, by name or number.")
@click.option("--gid", type=group, metavar="GROUP", help="Group of the files, by name or number.")
@click.option("--mode", metavar="MODE", help="Permissions of the files, octal.  [default: 0600, or 0400 read-only]")
@click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="With --read-only: ignore image locks, and read while another process writes.",
)
@gate_options
@click.option("--foreground", is_flag=True, help="Run in the foreground instead of leaving a daemon behind.")
@click.option(
    "--pid-file", metavar="FILE", shell_complete=complete_file, help="Write the daemon's process id to FILE when ready."
)
@click.option(
    "--ready-fd", type=click.IntRange(0), metavar="N", help="Write the line 'ready' to file descriptor N when ready."
)
@output_option
def command(**given: Any) -> None:
    """Mount each IMAGE as a flat raw file in the directory MOUNTPOINT.

    A file has the image's name without the extension of its format. A regular file as MOUNTPOINT becomes the
    one IMAGE itself. The command returns when the mount is ready; a daemon serves it until it is unmounted
    (fusedisk umount).
    """
    request = make_request(given)
    check_request(request)
    from fusedisk.cli.daemon import run_daemon

    if given["foreground"]:
        code = run_daemon(request, _raise_failure)
        raise click.exceptions.Exit(code)
    from fusedisk.cli import waiting
    from fusedisk.cli.background import run_in_background
    from fusedisk.mount import runtime

    log_path = runtime.log_path(request.mountpoint)
    if request.ready_fd is not None and request.ready_fd <= 2:
        # The daemon's own standard streams lead nowhere.
        request.ready_fd = fcntl.fcntl(request.ready_fd, fcntl.F_DUPFD_CLOEXEC, 3)
    with waiting.tell_when_interrupted(lambda: _state(request.mountpoint)):
        run_in_background(lambda report: run_daemon(request, report), log_path, request.ready_fd)
    if given["output"] == "json":
        _print_record(request.mountpoint)


def _state(place: str) -> str:
    """Return what an interrupted command leaves behind."""
    from fusedisk.mount import mountinfo

    if mountinfo.mount_at(place) is None:
        return f"nothing is mounted at '{place}'."
    return f"'{place}' is mounted, and will be unmounted as soon as it is not in use."


def _print_record(mountpoint: str) -> None:
    from fusedisk.cli.list import describe
    from fusedisk.core.errors import NotMountedError
    from fusedisk.mount import runtime

    record = runtime.find(mountpoint, os.geteuid())
    if record is None:
        raise NotMountedError(f"'{mountpoint}' was mounted, but has been unmounted already.")
    print_json(describe(record))


def make_request(given: dict[str, Any]) -> MountRequest:
    """Return what the options ask for. Raises OptionError, or UsageError for options that contradict each other."""
    from fusedisk.block.graph.filenames import parse_argument
    from fusedisk.cli.daemon import MountRequest
    from fusedisk.core import paths
    from fusedisk.export.export import FileSettings
    from fusedisk.export.names import check_name
    from fusedisk.export.opening import ImageRequest, OpenSettings, take_name
    from fusedisk.mount import mountinfo, mountpoint
    from fusedisk.mount.settings import Passthrough, ServeSettings

    _check_combination(given)
    images = []
    for text in given["images"]:
        spec, name = take_name(parse_argument(text))
        images.append(ImageRequest(text, spec, name))
    if given["name"] is not None:
        images[0].name = check_name(given["name"])
    return MountRequest(
        images=images,
        mountpoint=mountinfo.absolute(given["mountpoint"]),
        settings=_settings(
            OpenSettings,
            given,
            overlay_file=_absolute(given["overlay_file"]),
            key_file=_key_file(given["key_file"]),
            file=_settings(FileSettings, given, mode=_mode(given["mode"])),
        ),
        serve=_settings(
            ServeSettings,
            given,
            channel=given["channel"] != "off",
            kernel_cache=given["kernel_cache"] != "off",
            passthrough=Passthrough(given["passthrough"]),
        ),
        allow_other=mountpoint.allow_other(given["allow_other"]),
        allow_path=tuple(map(paths.absolute, given["allow_path"])),
        allow_any_reference=given["allow_any_reference"],
        pid_file=_absolute(given["pid_file"]),
        ready_fd=given["ready_fd"],
    )


def _settings(kind: type[_Settings], given: dict[str, Any], **converted: Any) -> _Settings:
    """Return settings whose fields have the names of the options; ``converted``: those that need another value than
    click's."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: given[name] for name in names - converted.keys()}, **converted)


def _check_combination(given: dict[str, Any]) -> None:
    """Raise UsageError for options that do not go together."""
    from fusedisk.access import check_access
    from fusedisk.core.errors import OptionError

    several = len(given["images"]) > 1
    wrong = [
        (several and given["overlay_file"] is not None, "--overlay-file is for one image, but several were given."),
        (several and given["name"] is not None, "--name is for one image; give each of several its own with 'name='."),
        (
            given["low_latency"] and given["channel"] == "off",
            "--low-latency needs the data channel, which --channel=off turns off: choose one of them.",
        ),
    ]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise click.UsageError(sentence)
    try:
        check_access(given, lambda name: "--" + name.replace("_", "-"))
    except OptionError as exc:
        raise click.UsageError(str(exc)) from None


def _mode(text: str | None) -> int | None:
    if text is None:
        return None
    mode = parse_octal(text)
    if mode is None:
        raise click.BadParameter(f"'{text}' is invalid; expected octal permissions, such as 0640.", param_hint="--mode")
    return mode


def parse_octal(text: str) -> int | None:
    """Return the permissions from ``640`` or ``0640``; None if they are invalid."""
    return int(text, 8) if re.fullmatch("0?[0-7]{1,3}", text) else None


def _absolute(path: str | None) -> str | None:
    from fusedisk.core import paths

    return None if path is None else paths.absolute(path)


def _key_file(path: str | None) -> str | None:
    if path is None:
        return None
    from fusedisk.crypto import secrets

    path = path if path == "-" else os.path.abspath(path)
    if secrets.can_be_read_once(path):
        secrets.read_blocking(path, None)  # the daemon has neither our standard input nor our pipes
    return path


def check_request(request: MountRequest) -> None:
    """Check all that can be checked before an image is opened; clean up after a daemon that died here."""
    from fusedisk.mount import mountpoint, runtime

    if request.ready_fd is not None:
        try:
            fcntl.fcntl(request.ready_fd, fcntl.F_GETFD)
        except OSError as exc:
            raise click.BadParameter(f"descriptor {request.ready_fd} is not open.", param_hint="--ready-fd") from exc
    if request.pid_file is not None:
        runtime.check_pid_file(request.pid_file)
    mountpoint.check_fuse()
    if mountpoint.clean_stale(request.mountpoint):
        tell(f"the mount of a daemon that died was cleaned up at '{request.mountpoint}'.")
    mountpoint.check_mountpoint(request.mountpoint, len(request.images))
    if os.path.isfile(request.mountpoint) and (request.settings.partitions or request.settings.snapshots):
        raise click.UsageError(
            f"--partitions and --snapshots make several files, but the mountpoint '{request.mountpoint}' is a regular "
            "file: use a directory."
        )
    runtime.directory()


def _raise_failure(failure: FusediskError | None) -> None:
    """Raise a failure to start in the foreground, where it is the command's own error."""
    if failure is not None:
        raise failure
