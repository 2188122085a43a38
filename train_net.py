#!/usr/bin/env python3
"""Train or evaluate from a config file: train_net.py --config-file F [--eval-only] [--resume] [KEY VALUE ...]."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("detectron2") is None:
        sys.exit(
            "train_net.py needs Detectron2, which is not installed; README.md has the commands. Prediction works "
            "without it: demo/demo.py --input picture.jpg"
        )
    from mask2former.d2.launch import main

    main()
