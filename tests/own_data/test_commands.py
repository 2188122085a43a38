"""``python -m mask2former data register``, its arguments, and the YAML that is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from mask2former.__main__ import main
from mask2former.own_data.yaml_text import add_custom_datasets, scalar, yaml_lines
from tests.own_data.small import KINDS, instance_set, semantic_set

ROOT = Path(__file__).parents[2]


def flags(source):
    words = []
    for key, value in source.to_mapping().items():
        words += [f"--{key.lower().replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_register_prints_what_the_engines_read(kind, tmp_path, capsys):
    yaml = pytest.importorskip("yaml")
    source = KINDS[kind](tmp_path)
    assert main(["data", "register", "--name", "mine", *flags(source)]) == 0
    output = capsys.readouterr()
    assert yaml.safe_load(output.out) == {"DATASETS": {"CUSTOM": [{"NAME": "mine", **source.to_mapping()}]}}
    assert "mine: 3 images" in output.err


def test_register_takes_training_and_validation_data(tmp_path, capsys):
    source = semantic_set(tmp_path)
    val = ["--images", source.images, "--semantic-masks", source.semantic_masks]
    assert main(["data", "register", "--name", "m", "--train", *flags(source), "--val", *val]) == 0
    text = capsys.readouterr().out
    assert text.count("NAME: m_train") == text.count("NAME: m_val") == 1
    assert text.count("CLASSES: [background, apple, pear]") == 2  # the validation data have the same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coco-json", "x.json"], "training data: --coco-json needs --images, which is not given"),
        (["--images", "x"], "training data: one of --panoptic-json, --coco-json, --object-masks"),
        (
            ["--coco-json", "none.json", "--images", "x"],
            "'m' of DATASETS.CUSTOM: COCO_JSON names none.json, which does not",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(words, message, capsys):
    assert main(["data", "register", "--name", "m", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_same_argument_twice_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["data", "register", "--name", "m", "--images", "a", "--images", "b"])
    assert "--images is given twice for train" in capsys.readouterr().err


def test_register_refuses_data_that_cannot_be_trained_on(tmp_path, capsys):
    source = instance_set(tmp_path)
    (tmp_path / "images/b.png").unlink()
    assert main(["data", "register", "--name", "m", *flags(source)]) == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "images/b.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:200])
    assert main(["data", "register", "--name", "m", *flags(source)]) == 2
    assert "cannot read the image" in capsys.readouterr().err


def test_register_adds_to_a_config_and_refuses_the_same_name(tmp_path):
    yaml = pytest.importorskip("yaml")
    source, config = instance_set(tmp_path), tmp_path / "c.yaml"
    config.write_text("_BASE_: base.yaml # kept\nDATASETS:\n  TRAIN: [mine]\nSEED: 1\n")
    for name in ("mine", "yours"):
        assert main(["data", "register", "--name", name, "--add-to", str(config), *flags(source)]) == 0
    assert "# kept" in config.read_text()
    custom = [{"NAME": name, **source.to_mapping()} for name in ("mine", "yours")]
    expected = {"_BASE_": "base.yaml", "DATASETS": {"TRAIN": ["mine"], "CUSTOM": custom}, "SEED": 1}
    assert yaml.safe_load(config.read_text()) == expected
    assert main(["data", "register", "--name", "mine", "--add-to", str(config), *flags(source)]) == 2
    assert yaml.safe_load(config.read_text()) == expected


ROW = {"NAME": "new", "IMAGES": "i"}
ADDED = "  - NAME: new\n    IMAGES: i\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "DATASETS:\n  CUSTOM:\n    - NAME: new\n      IMAGES: i\n"),
        ("SEED: 1\n", "SEED: 1\nDATASETS:\n  CUSTOM:\n    - NAME: new\n      IMAGES: i\n"),
        (
            "DATASETS:\n    TEST: [a]\n\nSEED: 1\n",
            "DATASETS:\n    CUSTOM:\n      - NAME: new\n        IMAGES: i\n    TEST: [a]\n\nSEED: 1\n",
        ),
        (  # items at the indentation of their key, which YAML allows; a comment, another key behind
            "DATASETS:\n  CUSTOM:\n  - NAME: old\n    IMAGES: i\n  # c\n  TEST: [a]\n",
            f"DATASETS:\n  CUSTOM:\n  - NAME: old\n    IMAGES: i\n{ADDED}  # c\n  TEST: [a]\n",
        ),
    ],
)
def test_only_the_list_changes(old, new):
    yaml = pytest.importorskip("yaml")
    text = add_custom_datasets(old, [ROW], Path("c.yaml"))
    assert text == new
    assert ROW in yaml.safe_load(text)["DATASETS"]["CUSTOM"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DATASETS: {TRAIN: [a]}\n", "DATASETS must be a section of indented lines"),
        ("DATASETS:\n  CUSTOM: []\n", "DATASETS.CUSTOM must have one item below the other"),
        ("DATASETS:\n  CUSTOM:\n    - IMAGES: i\n      NAME: 'new' # x\n", "of the NAME new already"),
    ],
)
def test_what_cannot_be_added_to_is_left_alone(text, message):
    with pytest.raises(ValueError, match=message):
        add_custom_datasets(text, [ROW], Path("c.yaml"))


def test_written_values_are_read_again():
    yaml = pytest.importorskip("yaml")
    values = {
        "texts": [
            "plain",
            "two words",
            "a: b",
            "# no",
            "",
            "yes",
            "Null",
            "1",
            "1e-4",
            "ü",
            "it's",
            'say "x"',
            "~/x",
            "~",
            "- x",
        ],
        "more": [
            "a/b.png",
            "/abs/x y",
            "C:\\x",
            "[x]",
            "*a",
            "@x",
            "trailing ",
            "tab\there",
            "-1",
            ".5",
            "a #b",
            "0x1",
        ],
        "numbers": [1, -1, 0.5, 1e-05, 1.5e-07, 1e20, 5e-4, True, False, None],
        "section": {"inner": {"a": 1}, "rows": [{"x": [1, 2], "y": "z"}, {"x": []}]},
    }
    assert yaml.safe_load("\n".join(yaml_lines(values))) == values
    assert scalar(1e-05) == "1.0e-05"


def test_the_program_itself():
    words = [sys.executable, "-m", "mask2former", "data", "register", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--panoptic-json" in done.stdout
