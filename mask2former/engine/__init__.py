"""Training and evaluation without Detectron2, from the same configs. Needs requirements-train.txt."""
