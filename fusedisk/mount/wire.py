"""The bytes of the kernel's FUSE protocol, as far as the channel reads and writes them itself.

All numbers are in the machine's byte order. Source: include/uapi/linux/fuse.h, protocol 7.x.
"""

from __future__ import annotations

import struct

MAX_WRITE = 1 << 20
"""Most bytes of data in one request."""

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, extensions' length, padding."""
OUT_HEADER = struct.Struct("=IiQ")
"""len, error (0 or a negative errno), unique."""

READ_LOCKOWNER = 1 << 1
"""Read flag: the data goes to a process. Reads that fill the kernel's page cache do not have it."""
READ_IN = struct.Struct("=QQIIQII")
"""fh, offset, size, read flags, lock owner, open flags, padding."""
WRITE_IN = struct.Struct("=QQIIQII")
"""fh, offset, size, write flags, lock owner, open flags, padding."""
WRITE_OUT = struct.Struct("=II")
"""size, padding."""
WRITE_CACHE = 1 << 0
"""Write flag: the kernel writes a page back on its own, which a program has changed through memory."""
GETATTR_IN = struct.Struct("=IIQ")
"""getattr flags, padding, fh."""
GETATTR_FH = 1 << 0
"""Getattr flag: it is for an open file, fh, and asks where that ends. ``fstat`` does not have it."""
OPEN_IN = struct.Struct("=II")
"""flags, open flags."""
OPEN_OUT = struct.Struct("=QIi")
"""fh, flags (FOPEN_*), backing id."""
RELEASE_IN = struct.Struct("=Q")
"""fh; what follows does not matter here."""
FSYNC_IN = struct.Struct("=QI")
"""fh, fsync flags (1: data only)."""
FLUSH_IN = struct.Struct("=Q")
"""fh."""
FALLOCATE_IN = struct.Struct("=QQQII")
"""fh, offset, length, mode, padding."""
LSEEK_IN = struct.Struct("=QQII")
"""fh, offset, whence, padding."""
LSEEK_OUT = struct.Struct("=Q")
"""offset."""
COPY_IN = struct.Struct("=QQQQQQQ")
"""fh and offset to read, nodeid, fh and offset to write, length, flags."""
INTERRUPT_IN = struct.Struct("=Q")
"""unique of the request that nobody waits for any more."""
INIT_IN = struct.Struct("=IIIII")
"""major, minor, max_readahead, flags, flags2."""
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH6x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth, request_timeout."""
INVALIDATE_INODE = struct.Struct("=Qqq")
"""nodeid, offset (negative: attributes only), length (0: to the end)."""

WRITE_HEAD = IN_HEADER.size + WRITE_IN.size
"""Bytes in front of a WRITE's data."""
LONGEST_HEAD = IN_HEADER.size + COPY_IN.size
"""Bytes of the longest message without data that the channel answers."""

GETATTR = 3
OPEN, READ, WRITE, RELEASE, FSYNC, FLUSH, INIT = 14, 15, 16, 18, 20, 25, 26
FORGET, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, LSEEK, COPY_FILE_RANGE = 2, 36, 38, 42, 43, 46, 47
NO_REPLY = frozenset((FORGET, BATCH_FORGET, INTERRUPT))
"""Opcodes that are not answered."""

DELETE_ENTRY = struct.Struct("=QQII")
"""nodeid of the directory, nodeid of the file, length of its name, padding; then the name and a zero byte."""
NOTIFY_INVALIDATE_INODE, NOTIFY_DELETE = 2, 6

ASYNC_READ, BIG_WRITES, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 18, 1 << 22
AUTO_INVAL_DATA = 1 << 12
"""Before a read the kernel asks for the attributes, if it has them no more, and drops its pages if the file changed."""
HANDLE_KILLPRIV_V2 = 1 << 28
"""A write takes set-uid bits away without being told; until the kernel believes that, it looks for them before each."""
INIT_EXT = 1 << 30
"""There are flags2."""
DIRECT_IO_ALLOW_MMAP, PASSTHROUGH = 1 << 36, 1 << 37

FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1 << 0, 1 << 1
FOPEN_PARALLEL_DIRECT_WRITES, FOPEN_PASSTHROUGH = 1 << 6, 1 << 7

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
"""Modes of fallocate(2)."""
