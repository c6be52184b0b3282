"""Partition tables: MBR with logical partitions, and GPT. Read only, from anything that can read bytes."""
