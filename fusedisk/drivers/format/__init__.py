"""Drivers that give meaning to the bytes of their ``file`` child: raw, qcow2."""
