"""Engines: who runs the jobs that a sweep hands over. One file each, one protocol; the jobs are files in folders."""
