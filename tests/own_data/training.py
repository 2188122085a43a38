"""A config of two iterations for a small data set of each kind."""

from pathlib import Path

import mask2former.own_data.yaml_text as yaml_text

SMOKE = Path(__file__).parents[2] / "configs/quick_schedules/smoke.yaml"
# kind -> (classes, mapper, what TEST switches on, the metric that evaluation must give)
EXPECTED = {
    "instance": (2, "coco_instance_lsj", "INSTANCE_ON", ("segm", "AP")),
    "object_masks": (2, "coco_instance_lsj", "INSTANCE_ON", ("segm", "AP")),
    "panoptic": (3, "coco_panoptic_lsj", "PANOPTIC_ON", ("panoptic_seg", "PQ")),
    "semantic": (3, "mask_former_semantic", "SEMANTIC_ON", ("sem_seg", "mIoU")),
}


def write_config(folder, name, kind, source):
    """A config file that trains and evaluates on the same three images, as a user would write it."""
    classes, mapper, switched_on, _ = EXPECTED[kind]
    tests = {key: key == switched_on for key in ("SEMANTIC_ON", "INSTANCE_ON", "PANOPTIC_ON")}
    tree = {
        "_BASE_": str(SMOKE),
        "DATASETS": {
            "TRAIN": [name],
            "TEST": [name],
            "CUSTOM": [{"NAME": name, **source.to_mapping()}],
        },
        "MODEL": {
            "SEM_SEG_HEAD": {"NUM_CLASSES": classes},
            "MASK_FORMER": {"NUM_OBJECT_QUERIES": 5, "TRAIN_NUM_POINTS": 64, "TEST": tests},
        },
        "INPUT": {"DATASET_MAPPER_NAME": mapper, "IMAGE_SIZE": 64, "SIZE_DIVISIBILITY": 32, "MIN_SIZE_TRAIN": [48],
                  "MIN_SIZE_TEST": 48},
        "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 2, "STEPS": [1]},
        "TEST": {"EVAL_PERIOD": 2},
        "OUTPUT_DIR": str(folder / "output"),
    }  # fmt: skip
    file = folder / "own.yaml"
    file.write_text("\n".join(yaml_text.yaml_lines(tree)) + "\n")
    return file
