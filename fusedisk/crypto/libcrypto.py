"""The block ciphers of OpenSSL's libcrypto, called in place on the caller's memory.

Why not a package from PyPI: disks are encrypted in sectors of 512 bytes, each with its own initialization
vector (IV), so a sector costs what two calls cost. The packages make a context object for every sector, which
takes four times as long, and release the interpreter lock for every sector, so that a busy second thread
slows them down further. Here calls for single sectors keep the lock and calls for long runs release it.

The library is loaded when the first cipher is made; opening a plain image does not load it. Memory is
safe because every address is that of a writable buffer, held and bounded by the caller's memoryview.

Source: OpenSSL's EVP_EncryptInit(3), the part that its versions 1.1 and 3 share.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple, TypeVar

from fusedisk.core.errors import FusediskError, NotSupportedError

BLOCK = 16
"""Bytes in a block and in an IV of every cipher here."""
SECTOR = 512
"""Bytes that share an IV."""

RELEASE_SIZE = 64 << 10
"""Bytes from which a call releases the interpreter lock. Getting it back may take milliseconds while another
thread computes, so it has to be worth it."""

LIBRARIES = ("libcrypto.so.3", "libcrypto.so.1.1")

_POINTER = ctypes.c_void_p
_AnyLibrary = TypeVar("_AnyLibrary", bound=ctypes.CDLL)


class _Library(NamedTuple):
    held: ctypes.PyDLL
    """Calls keep the interpreter lock."""
    released: ctypes.CDLL
    """Calls release the interpreter lock."""


@functools.cache
def _library() -> _Library:
    for name in LIBRARIES:
        try:
            return _Library(_declare(ctypes.PyDLL(name)), _declare(ctypes.CDLL(name)))
        except OSError:
            continue
    raise NotSupportedError(f"Encrypted images need OpenSSL's {LIBRARIES[0]}, which Debian's package libssl3 installs.")


def _declare(library: _AnyLibrary) -> _AnyLibrary:
    """Tell ctypes the functions' types; without them it would cut pointers to 32 bits."""
    library.EVP_get_cipherbyname.argtypes = (ctypes.c_char_p,)
    library.EVP_get_cipherbyname.restype = _POINTER
    library.EVP_CIPHER_CTX_new.argtypes = ()
    library.EVP_CIPHER_CTX_new.restype = _POINTER
    library.EVP_CIPHER_CTX_free.argtypes = (_POINTER,)
    library.EVP_CIPHER_CTX_free.restype = None
    library.EVP_CIPHER_CTX_set_padding.argtypes = (_POINTER, ctypes.c_int)
    for direction in ("Encrypt", "Decrypt"):
        getattr(library, f"EVP_{direction}Init_ex").argtypes = (_POINTER,) * 5
        getattr(library, f"EVP_{direction}Update").argtypes = (*(_POINTER,) * 4, ctypes.c_int)
    return library


class Context:
    """A cipher with a key and a direction, for one thread at a time."""

    __slots__ = ("_context", "_init", "_library", "_moved", "_update", "_update_released")

    def __init__(self, cipher: str, key: bytes, *, encrypt: bool) -> None:
        """``cipher`` is OpenSSL's name, such as ``aes-256-xts``; the key's length must be the cipher's.

        Raises NotSupportedError where the library lacks the cipher.
        """
        self._context: int | None = None
        self._library = library = _library()
        direction = "Encrypt" if encrypt else "Decrypt"
        self._init = getattr(library.held, f"EVP_{direction}Init_ex")
        self._update = getattr(library.held, f"EVP_{direction}Update")
        self._update_released = getattr(library.released, f"EVP_{direction}Update")
        self._moved = ctypes.c_int()
        kind = library.held.EVP_get_cipherbyname(cipher.encode())
        if kind is None:
            raise NotSupportedError(f"OpenSSL's libcrypto has no cipher '{cipher}'.")
        self._context = library.held.EVP_CIPHER_CTX_new()
        if self._context is None:
            raise MemoryError("libcrypto has no memory for a cipher")
        if self._init(self._context, kind, None, ctypes.c_char_p(key), ctypes.c_char_p(bytes(BLOCK))) != 1:
            raise FusediskError(f"OpenSSL's libcrypto refuses the key for '{cipher}'.")
        library.held.EVP_CIPHER_CTX_set_padding(self._context, 0)

    def __del__(self) -> None:
        if self._context is not None:
            self._library.held.EVP_CIPHER_CTX_free(self._context)  # which wipes the key

    def run(self, view: memoryview, iv: bytes | None = None) -> None:
        """Transform ``view``, writable and a multiple of the block long, in place and as one unit from ``iv``."""
        memory = ctypes.c_char.from_buffer(view)
        address = ctypes.addressof(memory)
        update = self._update if len(view) < RELEASE_SIZE else self._update_released
        if (iv is not None and self._init(self._context, None, None, None, ctypes.c_char_p(iv)) != 1) or update(
            self._context, address, ctypes.addressof(self._moved), address, len(view)
        ) != 1:
            raise _failure()

    def run_sectors(self, view: memoryview, ivs: bytearray) -> None:
        """Transform ``view``, writable and whole sectors long, in place; ``ivs`` holds an IV for each sector."""
        count = len(view) // SECTOR
        if len(ivs) != count * BLOCK:
            raise ValueError(f"{len(ivs)} bytes of IVs for {count} sectors")
        memory, iv_memory = ctypes.c_char.from_buffer(view), ctypes.c_char.from_buffer(ivs)
        first, first_iv = ctypes.addressof(memory), ctypes.addressof(iv_memory)
        context, init, update, moved = self._context, self._init, self._update, ctypes.addressof(self._moved)
        iv_addresses = range(first_iv, first_iv + count * BLOCK, BLOCK)
        for address, iv in zip(range(first, first + count * SECTOR, SECTOR), iv_addresses, strict=True):
            if init(context, None, None, None, iv) != 1 or update(context, address, moved, address, SECTOR) != 1:
                raise _failure()


def _failure() -> FusediskError:
    return FusediskError("OpenSSL's libcrypto failed to transform data that it should accept.")


class Contexts:
    """Contexts of one cipher, key and direction for any number of threads: a thread takes one and gives it back."""

    def __init__(self, cipher: str, key: bytes, *, encrypt: bool) -> None:
        self._make = functools.partial(Context, cipher, key, encrypt=encrypt)
        self._idle = [self._make()]

    def run(self, view: memoryview, iv: bytes | None = None) -> None:
        """As :meth:`Context.run`."""
        context = self._take()
        context.run(view, iv)
        self._idle.append(context)

    def run_sectors(self, view: memoryview, ivs: bytearray) -> None:
        """As :meth:`Context.run_sectors`."""
        context = self._take()
        context.run_sectors(view, ivs)
        self._idle.append(context)

    def _take(self) -> Context:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()
