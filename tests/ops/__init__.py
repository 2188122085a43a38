"""Tests of `mask2former.ops`."""
