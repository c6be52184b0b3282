"""qcow2, QEMU's copy-on-write image format, versions 2 and 3.

``layout`` and ``entries`` are bytes without I/O; ``image`` is the state of one open image and the only place
that writes metadata; ``cache`` holds tables, ``refcount`` allocates, ``cluster`` maps, ``discard``,
``resize``, ``compressed`` (reads), ``compress`` (writes) and ``snapshot`` do what their names say, ``subclusters`` and
``subcluster_allocation`` do it for extended L2 entries; ``driver`` puts them together and
``create`` makes new images.

The specification is docs/interop/qcow2.txt of QEMU.
"""
