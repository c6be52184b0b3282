"""Options of the qcow2 driver, for open and create."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

from fusedisk.block.model.node import NodeConfig
from fusedisk.core.errors import OptionError
from fusedisk.core.options import CreateOptions, Options, flatten, option
from fusedisk.crypto import secrets
from fusedisk.drivers.format.qcow2.entries import Geometry
from fusedisk.drivers.format.qcow2.freed import Reason
from fusedisk.drivers.format.qcow2.image import MIN_L2_TABLES
from fusedisk.drivers.format.qcow2.layout import Header
from fusedisk.drivers.format.qcow2.refcount import MIN_BLOCKS

PREALLOCATIONS = ("off", "metadata", "falloc", "full")
if TYPE_CHECKING:
    from fusedisk.crypto import luks

DEFAULT_L2_CACHE = 32 << 20
DEFAULT_REFCOUNT_CACHE = 256 << 10
OVERLAP_CHECKS = ("none", "constant", "cached", "all")


class EncryptionOptions(Protocol):
    """The options that opening and creating have in common."""

    encrypt_format: str | None
    encrypt_key_file: str | None
    encrypt_key_format: str | None


def _encrypt_format() -> Any:
    return option(None, name="encrypt.format", choices=("luks", "aes"), help="encryption: luks, or aes of old images")


def _key_file() -> Any:
    return option(
        None, kind="file", name="encrypt.key-file", help="file with the passphrase; - is standard input's first line"
    )


def _key_format() -> Any:
    return option(None, name="encrypt.key-format", choices=("raw", "base64"), help="raw or base64 (default: raw)")


@dataclasses.dataclass(slots=True)
class Qcow2Options(Options):
    """Options at open."""

    encrypt_format: str | None = _encrypt_format()
    encrypt_key_file: str | None = _key_file()
    encrypt_key_format: str | None = _key_format()
    l2_cache_size: int | None = option(
        None, kind="size", help="bytes of the L2 table cache (default: what covers the disk, up to 32M)"
    )
    refcount_cache_size: int | None = option(
        None, kind="size", help="bytes of the refcount block cache (default: 4 clusters, at least 256k)"
    )
    cache_size: int | None = option(None, kind="size", help="bytes of both caches together")
    internal_snapshot: str | None = option(
        None, help="id or name of an internal snapshot to open in place of the disk, read-only"
    )
    lazy_refcounts: bool | None = option(
        None, kind="bool", help="write refcounts when the image is closed only (default: what the image asks for)"
    )
    pass_discard_request: bool | None = option(
        None, kind="bool", help="give the host the space that the guest discards (default: as the discard option says)"
    )
    pass_discard_snapshot: bool = option(
        True, kind="bool", help="give the host the space that a snapshot alone had used"
    )
    pass_discard_other: bool = option(False, kind="bool", help="give the host the space that is freed in other ways")
    discard_no_unref: bool = option(
        False, kind="bool", help="keep the clusters of what the guest discards for it, so that nothing gets fragmented"
    )
    overlap_check: str = option(
        "cached",
        help="metadata that no write may touch: none, constant (header, L1, refcount and snapshot tables), "
        "cached (also refcount blocks, L2 tables and snapshots' L1 tables), all (also snapshots' L2 tables)",
        choices=OVERLAP_CHECKS,
    )

    @classmethod
    def parse(cls, given: Mapping[str, Any], owner: str) -> Self:
        # QMP has both "overlap-check": "all" and "overlap-check": {"template": "all"}.
        check = given.get("overlap-check")
        if isinstance(check, Mapping) and check.keys() == {"template"}:
            given = {**given, "overlap-check": check["template"]}
        return super(Qcow2Options, cls).parse(given, owner)


@dataclasses.dataclass(slots=True)
class Qcow2CreateOptions(CreateOptions):
    """Options at creation."""

    size: int = option(0, kind="size", help="virtual disk size")
    compat: str = option("1.1", help="compatibility level: v2 (0.10) or v3 (1.1)", choices=("0.10", "1.1", "v2", "v3"))
    backing_file: str | None = option(None, help="image that this one is an overlay of")
    backing_fmt: str | None = option(None, help="format of the backing file")
    cluster_size: int = option(65536, kind="size", help="unit of allocation, 512 bytes to 2M")
    preallocation: str = option(
        "off",
        help="space reserved at creation: off, metadata, falloc, full",
        choices=PREALLOCATIONS,
    )
    lazy_refcounts: bool = option(False, kind="bool", help="let programs postpone refcount updates")
    refcount_bits: int = option(16, kind="int", help="width of a refcount: 1, 2, 4, 8, 16, 32 or 64 bits")
    extended_l2: bool = option(
        False, kind="bool", help="map each cluster in 32 parts, of which a write copies or allocates those it touches"
    )
    compression_type: str = option("zlib", help="how clusters are compressed: zlib or zstd", choices=("zlib", "zstd"))
    data_file: str | None = option(None, help="file that the guest's data goes to, apart from the metadata")
    data_file_raw: bool = option(False, kind="bool", help="keep the data file a raw image of the disk")
    nocow: bool = option(False, kind="bool", help="turn copy-on-write of the host file off (btrfs)")
    encrypt_format: str | None = _encrypt_format()
    encrypt_key_file: str | None = _key_file()
    encrypt_key_format: str | None = _key_format()
    encrypt_cipher_alg: str | None = option(
        None, name="encrypt.cipher-alg", help="luks: aes-128, -192 or -256 (default)"
    )
    encrypt_cipher_mode: str | None = option(
        None, name="encrypt.cipher-mode", help="luks: xts (default), cbc, ctr, ecb"
    )
    encrypt_ivgen_alg: str | None = option(None, name="encrypt.ivgen-alg", help="luks: plain, plain64 (default), essiv")
    encrypt_ivgen_hash_alg: str | None = option(None, name="encrypt.ivgen-hash-alg", help="luks: hash for essiv")
    encrypt_hash_alg: str | None = option(None, name="encrypt.hash-alg", help="luks: hash for keys (default: sha256)")
    encrypt_iter_time: int | None = option(
        None, kind="int", name="encrypt.iter-time", help="luks: milliseconds that unlocking shall take (default: 2000)"
    )


def check_read_only(options: Qcow2Options, config: NodeConfig, filename: str) -> None:
    """Raise OptionError for a writable node that shows a snapshot."""
    wanted = options.internal_snapshot
    if wanted is not None and not config.read_only:
        raise OptionError(
            f"'{filename}' cannot be writable with internal-snapshot '{wanted}', as snapshots are read-only."
        )


def passed_discards(options: Qcow2Options, config: NodeConfig) -> frozenset[Reason]:
    """Return the reasons of freeing for which the host gets the space."""
    request = options.pass_discard_request
    wanted = {
        Reason.REQUEST: config.discard == "unmap" if request is None else request,
        Reason.SNAPSHOT: options.pass_discard_snapshot,
        Reason.OTHER: options.pass_discard_other,
    }
    return frozenset(reason for reason, passes in wanted.items() if passes)


def luks_options(options: Qcow2CreateOptions) -> luks.Options:
    """The settings of a new LUKS header."""
    from fusedisk.crypto import luks

    given = {
        field.name: getattr(options, f"encrypt_{field.name}")
        for field in dataclasses.fields(luks.Options)
        if getattr(options, f"encrypt_{field.name}", None) is not None
    }
    return luks.Options(**given)


def cache_sizes(options: Qcow2Options, header: Header) -> tuple[int, int]:
    """Bytes for the L2 cache and the refcount cache. Raises OptionError where the options contradict each
    other.
    """
    geometry = Geometry(header)
    tables = max(-(-header.size // (1 << geometry.span_bits)), MIN_L2_TABLES)
    covering = tables * geometry.cluster_size
    fewest_blocks = MIN_BLOCKS * geometry.cluster_size
    l2, refcounts, both = options.l2_cache_size, options.refcount_cache_size, options.cache_size
    if both is None:
        if l2 is None:
            l2 = min(covering, DEFAULT_L2_CACHE)
        if refcounts is None:
            refcounts = max(fewest_blocks, DEFAULT_REFCOUNT_CACHE)
        return l2, refcounts
    if l2 is not None and refcounts is not None:
        raise OptionError(
            "qcow2 options 'cache-size', 'l2-cache-size' and 'refcount-cache-size' are all set, but two of "
            "them are enough."
        )
    for name, size in (("l2-cache-size", l2), ("refcount-cache-size", refcounts)):
        if size is not None and size > both:
            raise OptionError(f"qcow2 option '{name}' is {size}, expected at most the 'cache-size' of {both}.")
    if l2 is not None:
        return l2, both - l2
    if refcounts is not None:
        return both - refcounts, refcounts
    if both >= covering + fewest_blocks:
        return covering, both - covering
    refcounts = min(both, fewest_blocks)
    return both - refcounts, refcounts


# --- settings that can be changed later ---------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Qcow2AmendOptions(CreateOptions):
    """New settings of an image; None leaves one as it is."""

    size: int | None = option(None, kind="size", help="virtual disk size")
    compat: str | None = option(
        None, help="compatibility level: v2 (0.10) or v3 (1.1)", choices=("0.10", "1.1", "v2", "v3")
    )
    backing_file: str | None = option(
        None, help="name of the backing file, empty for none; only with force, as the disk may then read otherwise"
    )
    backing_fmt: str | None = option(None, help="format of the backing file")
    data_file: str | None = option(None, help="name of the external data file, where the image has one")
    data_file_raw: bool | None = option(None, kind="bool", help="keep the data file a raw image; can only be ended")
    lazy_refcounts: bool | None = option(None, kind="bool", help="let programs postpone refcount updates")
    refcount_bits: int | None = option(None, kind="int", help="width of a refcount: 1, 2, 4, 8, 16, 32 or 64 bits")
    encrypt_state: str | None = option(
        None,
        name="encrypt.state",
        choices=("active", "inactive"),
        help="luks: active adds a passphrase, inactive removes one",
    )
    encrypt_keyslot: int | None = option(None, kind="int", name="encrypt.keyslot", help="luks: which key slot, 0 to 7")
    encrypt_new_key_file: str | None = option(
        None, name="encrypt.new-key-file", help="luks: file with the passphrase to add"
    )
    encrypt_new_key_format: str | None = option(
        None, name="encrypt.new-key-format", choices=secrets.FORMATS, help="raw or base64 (default: raw)"
    )
    encrypt_old_key_file: str | None = option(
        None, name="encrypt.old-key-file", help="luks: file with the passphrase to remove"
    )
    encrypt_old_key_format: str | None = option(
        None, name="encrypt.old-key-format", choices=secrets.FORMATS, help="raw or base64 (default: raw)"
    )
    encrypt_iter_time: int | None = option(
        None, kind="int", name="encrypt.iter-time", help="luks: milliseconds that unlocking shall take (default: 2000)"
    )

    @classmethod
    def parse(cls, given: Mapping[str, Any], owner: str) -> Self:
        names = cls.names()
        for name in flatten(given):
            if name not in names and name in Qcow2CreateOptions.names():
                raise OptionError(f"{owner} option '{name}' can only be chosen when an image is created.")
        return super(Qcow2AmendOptions, cls).parse(given, owner)

    @property
    def version(self) -> int | None:
        """The version of the format that ``compat`` asks for."""
        return None if self.compat is None else 2 if self.compat in ("0.10", "v2") else 3

    @property
    def encryption(self) -> list[str]:
        """Names of the options given that concern keys."""
        return [name for name in self.given() if name.startswith("encrypt.")]
