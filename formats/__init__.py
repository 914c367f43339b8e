"""Folders and files of other libraries: a file each, no computation."""
