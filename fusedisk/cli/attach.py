"""``fusedisk attach``: a mount at a place of its own, and a loop device on its one file."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from fusedisk.cli import mount as mounting
from fusedisk.cli.image import complete_file
from fusedisk.cli.output import flush, output_option, print_json, say, tell

_UDEV = "/run/udev"
"""Is there where udev makes the nodes of devices."""
_NODES_SECONDS, _PAUSE = 3.0, 0.02
"""How long to wait for udev, and between two looks."""
_OF_MOUNT = (
    "read_only",
    "overlay",
    "overlay_file",
    "name",
    "format",
    "key_file",
    "copy_on_read",
    "detect_zeroes",
    "discard",
    "cache",
    "kernel_cache",
    "passthrough",
    "channel",
    "low_latency",
    "force_share",
    "allow_path",
    "allow_any_reference",
)
"""Options of ``fusedisk mount`` that mean the same here."""


@click.command(
    epilog="""\b
Examples:
  fusedisk attach vm.qcow2                          # prints /dev/loop0; its partitions are /dev/loop0p1 ...
  fusedisk attach --overlay vm.qcow2                # writes are thrown away at the end
  fusedisk attach --read-only --output json vm.qcow2
  fusedisk attach --sector-size 4096 disk.img

Then: mount /dev/loop0p1 /mnt/files, fusedisk detach /dev/loop0"""
)
@click.argument("image", shell_complete=complete_file)
@click.option(
    "--sector-size",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="Size of the device's sectors in bytes.",
)
@click.option(
    "--direct-io",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Bypass the page cache of the mounted file; auto: if the kernel can.",
)
@output_option
def command(image: str, sector_size: str, direct_io: str, output: str, **given: Any) -> None:
    """Attach IMAGE to a free loop device and print its name; its partitions become devices too.

    A daemon serves it until it is detached (fusedisk detach). Needs root.
    """
    from fusedisk.cli import waiting
    from fusedisk.cli.background import run_in_background
    from fusedisk.cli.detach import detach_record
    from fusedisk.cli.list import describe
    from fusedisk.mount import device_nodes, holders, loop_device, runtime

    loop_device.check()
    place = runtime.make_place()
    try:
        with mounting.command.make_context("mount", ["--", image, place]) as context:
            request = mounting.make_request({**context.params, **given})
        request.loop = loop_device.LoopSettings(int(sector_size), direct_io)
        mounting.check_request(request)
        from fusedisk.cli.daemon import run_daemon

        with waiting.tell_when_interrupted(lambda: f"'{image}' is not attached."):
            run_in_background(lambda report: run_daemon(request, report), runtime.log_path(place))
        record = runtime.find(place, os.geteuid())
        assert record is not None, "a daemon that is ready has a record"
        assert record.loop is not None
    except BaseException:
        runtime.remove_place(place)
        raise
    (export,) = record.exports
    if export.size % int(sector_size):
        tell(
            f"'{image}' is {export.size} bytes long, {record.loop} ends before the last "
            f"{export.size % int(sector_size)}, which fill no sector."
        )
    try:
        found, missing = _partitions(record.loop)
        if missing:
            tell(
                f"this /dev has no nodes for {holders.listed(missing)}, as in a container without udev or devtmpfs: "
                f"make what you need (such as {device_nodes.mknod_command(missing[0])})."
            )
        if output == "json":
            print_json({**describe(record), "partitions": found})
        else:
            say(record.loop)
        flush()
    except BaseException:
        # Nobody would know what to detach.
        detach_record(record, wait=False, deadline=None, force=False)
        raise


def _partitions(device: str) -> tuple[list[str], list[str]]:
    """The partitions of a device that /dev has, and those that it lacks. Where udev makes the nodes, that may take a
    moment; where nobody does, we do, if we may."""
    from fusedisk.mount import device_nodes, loop_device

    deadline = time.monotonic() + _NODES_SECONDS
    while True:
        partitions = loop_device.partitions(device)
        missing = [name for name in partitions if not device_nodes.has_node(name)]
        if not missing or not os.path.isdir(_UDEV) or time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)
    missing = [name for name in missing if not device_nodes.make_node(name)]
    return [name for name in partitions if name not in missing], missing


command.params[1:1] = [param for param in mounting.command.params if param.name in _OF_MOUNT]
