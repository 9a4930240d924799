"""Families of checks, one file each: ``CHECKS`` explains their codes, ``SCANS`` finds text ones."""
