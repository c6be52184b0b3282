# Sourced by the scripts beside it: what they share about system packages, Python and /dev/fuse.
#
#   . "$(dirname "$0")/common.sh"
#   set_up run      # or `test`: the packages for the test suite and the bench, too
#   "$VENV/bin/fusedisk" …
#
# FUSEDISK_PYTHON names the Python to use; otherwise the first complete one is found.
# shellcheck shell=bash

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' PLAIN=$'\e[0m'
else
    BOLD='' DIM='' RED='' GREEN='' PLAIN=''
fi

say() { printf '%s\n' "${BOLD}==>${PLAIN} $*"; }
die() {
    printf '%s\n' "${RED}${0##*/}: $*${PLAIN}" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" -eq 0 ]; }

# Debian package and the program that shows it is there.
RUN_PACKAGES='
    attr:getfattr
    e2fsprogs:mkfs.ext4
    e2fsprogs:debugfs
    fdisk:sfdisk
    fuse3:fusermount3
    gcc:cc
    kmod:modprobe
    mount:losetup
    pkg-config:pkg-config
    qemu-utils:qemu-img
    util-linux:flock
'
TEST_PACKAGES='
    borgbackup:borg
    btrfs-progs:mkfs.btrfs
    cryptsetup-bin:cryptsetup
    dosfstools:mkfs.vfat
    fio:fio
    gdisk:sgdisk
    groff-base:groff
    mtools:mcopy
    qemu-system-common:qemu-storage-daemon
    qemu-utils:qemu-io
    restic:restic
    rsync:rsync
    sleuthkit:fls
    strace:strace
    stress-ng:stress-ng
    sudo:sudo
    systemd:systemd-analyze
    xfsprogs:mkfs.xfs
'

# Prints the packages that are missing, one a line: $1 is `run` or `test`.
missing_packages() {
    local wanted=$RUN_PACKAGES pair
    if [ "$1" = test ]; then wanted+=$TEST_PACKAGES; fi
    {
        for pair in $wanted; do
            have "${pair#*:}" || echo "${pair%%:*}"
        done
        if ! { have pkg-config && pkg-config --exists fuse3; }; then echo libfuse3-dev; fi
        if ! find_python >/dev/null; then printf '%s\n' python3 python3-dev python3-venv; fi
    } | sort -u
}

# Prints the path of a Python that is new enough, makes virtual environments and can compile extensions.
find_python() {
    local candidate path
    for candidate in ${FUSEDISK_PYTHON:-/usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11}; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        if "$path" - >/dev/null 2>&1 <<'PROBE'; then
import ensurepip, os, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PROBE
            echo "$path"
            return 0
        fi
    done
    return 1
}

install_packages() {
    local missing log
    missing=$(missing_packages "$1" | tr '\n' ' ')
    missing=${missing% }
    [ -n "$missing" ] || return 0
    have apt-get || die "please install what Debian calls: $missing"
    is_root || die "some system packages are missing; please run: sudo apt-get install $missing"
    say "installing system packages: $missing"
    log=$(mktemp)
    if ! {
        DEBIAN_FRONTEND=noninteractive apt-get update -q &&
            # shellcheck disable=SC2086 # a list of words
            DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
    } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: $missing"
    fi
    rm -f "$log"
    missing=$(missing_packages "$1" | tr '\n' ' ')
    [ -z "$missing" ] || die "installed, but still not usable: $missing"
}

# A second run is instant: the stamp holds what the environment was made from.
make_venv() {
    local python
    if venv_is_current; then return 0; fi
    [ -w "$ROOT" ] || die "$ROOT has no usable .venv, and only who may write there can make one with scripts/setup"
    exec 9>"$ROOT/.venv.lock"
    flock 9
    if venv_is_current; then # another script made it while this one waited
        exec 9>&-
        return 0
    fi
    if [ ! -f "$VENV/stamp" ] || ! "$VENV/bin/python" -c '' 2>/dev/null ||
        [ "$VENV" != "$(sed -n 2p "$VENV/stamp")" ]; then
        python=$(find_python) || die "no Python >= 3.11 with venv and headers was found (FUSEDISK_PYTHON names one)"
        say "making a virtual environment in .venv with $("$python" --version) ($python)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
    say "installing fusedisk and its Python packages into .venv (pyfuse3 is compiled: a minute or so)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$ROOT[dev]" ||
        die "pip could not install the packages that pyproject.toml names"
    venv_stamp >"$VENV/stamp"
    exec 9>&-
}

venv_is_current() { [ "$(venv_stamp 2>/dev/null)" = "$(cat "$VENV/stamp" 2>/dev/null)" ]; }

venv_stamp() {
    sha256sum <"$ROOT/pyproject.toml"
    echo "$VENV"
    "$VENV/bin/python" --version
}

# Fresh machines and containers lack the device, or keep it to root; fuse3's own rule makes it 0666.
prepare_devices() {
    is_root || return 0
    if [ ! -e /dev/fuse ]; then
        modprobe fuse 2>/dev/null || true
        if [ ! -e /dev/fuse ] && grep -qw fuse /proc/filesystems; then
            say "making /dev/fuse"
            mknod -m 0666 /dev/fuse c 10 229 || true
        fi
    fi
    if [ -c /dev/fuse ] && [ "$(stat -c %a /dev/fuse)" != 666 ]; then
        say "making /dev/fuse usable for everyone (mode 0666, as fuse3's udev rule does)"
        chmod 0666 /dev/fuse || true
    fi
    if [ ! -e /dev/loop-control ]; then modprobe loop 2>/dev/null || true; fi
}

# set_up run|test
set_up() {
    install_packages "$1"
    prepare_devices
    make_venv
}
