"""Tests; a package, so that test files of different folders may share a name."""
