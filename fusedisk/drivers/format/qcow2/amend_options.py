"""The settings of an existing qcow2 image that can be changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from fusedisk.core.errors import OptionError
from fusedisk.core.options import CreateOptions, flatten, option
from fusedisk.crypto import secrets
from fusedisk.drivers.format.qcow2.options import Qcow2CreateOptions


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
