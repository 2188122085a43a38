"""Checks of each kind of data set.

Each module has `examine(source, ...)`, which reads what is common to all images and gives a `Plan`: findings so far,
and one job for each image. A job is called without arguments, in any process, and gives an `ImageScan`.
"""
