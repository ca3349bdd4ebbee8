"""Bytes on the disk: positional reads past the page cache, slabs, parts, CRC-32."""
