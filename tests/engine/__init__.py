"""Tests of the embedded engine; none needs Detectron2."""
