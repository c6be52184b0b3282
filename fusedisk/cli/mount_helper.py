"""``mount.fuse.fusedisk``: what mount(8) runs for ``mount -t fuse.fusedisk`` and for such lines of /etc/fstab.

Its calling convention is that of every helper of mount(8), ``mount.fuse.fusedisk SOURCE DIR [-sfnv] [-o OPTIONS]``, and
so are its exit codes. It puts the options into those of ``fusedisk mount`` and runs that.
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from fusedisk.cli import entry, exit_codes
from fusedisk.cli import main as program
from fusedisk.cli import mount as mounting
from fusedisk.cli.output import escape, tell_lines

USAGE = "usage: mount.fuse.fusedisk IMAGE DIR [-sfnv] [-o OPTIONS]"
EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED, EXIT_FAILED = 1, 4, 8, 32
"""Of mount(8)."""
_EXIT_CODES = {
    0: 0,
    exit_codes.USAGE: EXIT_USAGE,
    exit_codes.BUG: EXIT_BUG,
    exit_codes.INTERRUPTED: EXIT_INTERRUPTED,
}

_NO_MATTER = """rw defaults auto noauto nofail _netdev user nouser users owner group async nosync dirsync
    dev nodev suid nosuid exec noexec atime noatime diratime nodiratime relatime norelatime strictatime nostrictatime
    lazytime nolazytime iversion noiversion mand nomand silent loud default_permissions symfollow nosymfollow"""
_WITHOUT_MEANING = frozenset(_NO_MATTER.split())
"""Options that speak to mount(8), or of what a mount of ours never has: devices, programs, access times."""
_TO_OTHERS = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")
_NOT_HERE = frozenset({"foreground", "ready_fd", "output", "help"})
"""Options of ``fusedisk mount`` that make no sense for a command that mount(8) waits for."""
_DEFAULT_VALUES = {"allow-other": "on", "discard": "unmap"}
"""Of options that other filesystems have without a value."""
_OWN_MODE = 0o666


class HelperUsageError(Exception):
    """The command line is wrong; its text says how."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The program: mount as ``args`` (default: the process's own) say, and exit."""
    entry.prepare_streams()
    args = sys.argv[1:] if args is None else args
    try:
        change = remounting(args)
        if change is not None:
            sys.exit(_EXIT_CODES.get(program.report_errors(lambda: _remount(*change)), EXIT_FAILED))
        command_line = translate(args)
    except HelperUsageError as exc:
        tell_lines(f"mount.fuse.fusedisk: {escape(str(exc))}")
        sys.exit(EXIT_USAGE)
    if command_line is None:
        sys.exit(0)
    sys.exit(_EXIT_CODES.get(program.run(command_line), EXIT_FAILED))


def translate(args: Sequence[str]) -> list[str] | None:
    """The command line of ``fusedisk`` for one of ours; None where nothing is to be done (``-f``).

    Raises HelperUsageError.
    """
    given, places = _parse(args)
    flags = {flag for flag, _ in given}
    options = _options(given)
    translated = _translate_options(options, sloppy="-s" in flags)
    if "-f" in flags:
        return None
    return [*(["-v"] if "-v" in flags else []), "mount", *translated, "--", *places]


def _parse(args: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Flags with their values, and the image and the directory. Raises HelperUsageError."""
    try:
        given, places = getopt.gnu_getopt(list(args), "sfnvrwo:t:")
    except getopt.GetoptError as exc:
        raise HelperUsageError(f"{exc}; {USAGE}") from exc
    if len(places) != 2:
        raise HelperUsageError(f"expected an image and a directory, found {len(places)} names; {USAGE}")
    return given, places


def _options(given: list[tuple[str, str]]) -> list[str]:
    options = [option for flag, text in given if flag == "-o" for option in split_options(text)]
    return options + ["ro"] * (("-r", "") in given)


def remounting(args: Sequence[str]) -> tuple[str, bool] | None:
    """The directory that is to be remounted, and whether read-only; None where the command line asks for no remount.

    Other options are those of the mount, which stay: mount(8) names all of them. Raises HelperUsageError.
    """
    flags, places = _parse(args)
    options = _options(flags)
    if "remount" not in options:
        return None
    read_only = False
    for option in options:
        if option in ("ro", "rw"):
            read_only = option == "ro"
    return places[1], read_only


def _remount(place: str, read_only: bool) -> None:
    """Raises a FusediskError."""
    from fusedisk.cli import flushing
    from fusedisk.core.errors import HostError, NotMountedError, ReadOnlyError
    from fusedisk.mount import mountinfo, remounting, runtime

    place = mountinfo.absolute(place)
    mount = mountinfo.mount_at(place)
    if mount is None or mount.fstype != mountinfo.FSTYPE:
        raise NotMountedError(f"no mount of fusedisk is at '{place}', so it cannot be remounted.")
    record = runtime.find(place, mount.user_id)
    if record is None or not record.alive:
        raise HostError(f"the daemon of '{place}' has died, so it cannot be remounted: unmount it (fusedisk umount).")
    if read_only:
        failure = flushing.flush(record, None)
        if failure is not None:
            raise HostError(
                f"'{failure.path}' could not be flushed ({os.strerror(failure.errno)}) and stays writable.",
                errno=failure.errno,
            )
    elif all(export.read_only for export in record.exports):
        raise ReadOnlyError(f"'{place}' was mounted read-only: unmount it and mount it again without 'ro'.")
    remounting.remount(mount, read_only=read_only)


def split_options(text: str) -> list[str]:
    """The options between commas; a comma within double quotes, or after a backslash, is one of a value."""
    found, quoted, escaped = [""], False, False
    for char in text:
        if escaped or (char not in '\\",') or (char == "," and quoted):
            found[-1] += char
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        else:
            found.append("")
    return [option for option in found if option]


def _translate_options(options: list[str], *, sloppy: bool) -> list[str]:
    known = {
        param.opts[-1].removeprefix("--"): param
        for param in mounting.command.params
        if isinstance(param, click.Option) and param.name not in _NOT_HERE
    }
    read_only = False
    words: dict[str, list[str]] = {}  # the last one counts, but for options that may be repeated
    for option in options:
        name, has_value, value = option.partition("=")
        name = name.replace("_", "-")
        if name in ("ro", "rw", "read-only"):
            _one_option(known["read-only"], name, value if has_value else None)
            read_only = name != "rw"
        elif name == "umask":
            words["mode"] = ["--mode", f"{_OWN_MODE & ~_octal(value):o}"]
        elif option == "nodiscard":
            words["discard"] = ["--discard", "ignore"]
        elif name == "sync":
            words.setdefault("cache", ["--cache", "writethrough"])
        elif option in _WITHOUT_MEANING or option.startswith(_TO_OTHERS):
            continue
        elif name in known:
            new = _one_option(known[name], name, value if has_value else None)
            words[name] = words.get(name, []) + new if known[name].multiple else new
        elif not sloppy:
            raise HelperUsageError(f"the option '{option}' is unknown; 'fusedisk mount --help' lists them.")
    if read_only:
        words.pop("overlay", None)  # nothing will be written that it could take
        words["read-only"] = ["--read-only"]
    return [word for group in words.values() for word in group]


def _one_option(param: click.Option, name: str, value: str | None) -> list[str]:
    if param.is_flag:
        if value is not None:
            raise HelperUsageError(f"the option '{name}' takes no value, but '{value}' was given.")
        return [f"--{name}"]
    if value is None:
        value = _DEFAULT_VALUES.get(name)
    if not value:
        raise HelperUsageError(f"the option '{name}' needs a value: {name}={param.metavar or 'VALUE'}.")
    return [f"--{name}", value]


def _octal(text: str) -> int:
    value = mounting.parse_octal(text)
    if value is None:
        raise HelperUsageError(f"umask={text} is invalid; expected an octal mask, such as umask=027.")
    return value


if __name__ == "__main__":
    main()
