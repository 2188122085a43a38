"""Tests of `mask2former.modeling`."""
