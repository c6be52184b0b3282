"""Decompression with its worker pool, its cache of results and its reading ahead. Bytes in, bytes out."""
