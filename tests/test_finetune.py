"""Weights to start a training from: rows of the class head by category names, other queries, and the report."""

import logging
from pathlib import Path

import pytest
import torch

from mask2former.checkpoint import ModelDescription, save_model_file
from mask2former.finetune import OWN_ENTRY, StartReport, load_start
from tests.tiny import architecture, assert_equal_states, categories, fresh_model

HEAD = "sem_seg_head.predictor.class_embed"
QUERIES = {f"sem_seg_head.predictor.query_{name}.weight" for name in ("feat", "embed")}
EMPTY = "criterion.empty_weight"


def other_model(num_classes: int = 4, num_queries: int = 8):
    """As `fresh_model`, with other weights: each row of the head has its own number in it."""
    model = fresh_model(num_classes, num_queries)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        head = model.sem_seg_head.predictor.class_embed
        head.weight.copy_(torch.arange(num_classes + 1.0)[:, None].expand_as(head.weight) + 100)
        head.bias.copy_(torch.arange(num_classes + 1.0) + 200)
    return model


def assert_counts_each_tensor_once(report: StartReport, model, state) -> None:
    """Model and file, the latter under the model's names."""
    in_both = [*report.copied, *(p.name for p in report.part_copied), *report.reinitialised, *report.from_config]
    assert sorted([*in_both, *report.missing]) == sorted(model.state_dict())
    assert sorted([*in_both, *report.unused]) == sorted(state)
    assert EMPTY in state  # as in every checkpoint


def start(target, source, names=None, source_names=None):
    state = source.state_dict()
    report = load_start(target, state, categories=names, source_categories=source_names)
    assert_counts_each_tensor_once(report, target, state)
    return report


def head_of(model):
    head = model.sem_seg_head.predictor.class_embed
    return head.weight.detach(), head.bias.detach()


def test_rows_follow_the_names_in_whatever_order_and_the_rest_is_as_it_was() -> None:
    source, target = other_model(5), fresh_model(4)
    fresh = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    names, source_names = (
        ["dog", "unicorn", "Traffic_Light", "person"],
        ["person", "cat", "dog", "car", "traffic light"],
    )
    report = start(target, source, names, source_names)

    weight, bias = head_of(target)
    rows = {0: 2, 2: 4, 3: 0, 4: 5}  # row of the model: row of the file; the last one is "no object"
    for row, of in rows.items():
        assert torch.equal(weight[row], torch.full_like(weight[row], 100 + of)), row
        assert bias[row] == 200 + of
    assert torch.equal(weight[1], fresh[f"{HEAD}.weight"][1])
    assert bias[1] == fresh[f"{HEAD}.bias"][1]
    assert torch.equal(target.criterion.empty_weight, fresh[EMPTY])
    for name, tensor in target.state_dict().items():
        if not name.startswith(HEAD) and name != EMPTY:
            assert torch.equal(tensor, source.state_dict()[name]), name

    assert {tuple(part) for part in report.part_copied} == {(f"{HEAD}.weight", 4, 5), (f"{HEAD}.bias", 4, 5)}
    assert report.categories is not None
    assert report.categories.kept == ("dog", "Traffic_Light", "person")
    assert report.categories.new == ("unicorn",)
    assert report.categories.dropped == ("cat", "car")
    assert report.from_config == (EMPTY,)
    assert not report.missing
    assert not report.unused
    text = str(report)
    for words in (
        f"{HEAD}.weight (4 of 5 rows)",
        "3 categories kept: dog, Traffic_Light, person",
        "1 categories new: unicorn",
        "2 categories in the file only: cat, car",
        "1 set by the config: criterion.empty_weight",
        f"{len(report.copied)} tensors copied: backbone (",
    ):
        assert words in text, words


def test_the_same_classes_are_copied_whole() -> None:
    source, target = other_model(4), fresh_model(4)
    report = start(target, source, ["a", "b", "c", "d"], ["a", "b", "c", "d"])
    assert not report.part_copied
    assert not report.needs_attention
    expected = source.state_dict() | {EMPTY: target.state_dict()[EMPTY]}
    assert_equal_states(target.state_dict(), expected)


def test_the_same_names_in_another_order_change_places() -> None:
    source, target = other_model(4), fresh_model(4)
    start(target, source, ["d", "c", "b", "a"], ["a", "b", "c", "d"])
    assert head_of(target)[1].tolist() == [203, 202, 201, 200, 204]


def test_classes_of_one_name_correspond_in_their_order() -> None:
    source, target = other_model(4), fresh_model(3)
    report = start(target, source, ["door", "door", "door"], ["wall", "door", "sky", "door"])
    assert head_of(target)[1].tolist()[:2] == [201, 203]
    assert report.categories is not None
    assert report.categories.new == ("door",)


def test_no_common_name_re_initialises_the_head_alone() -> None:
    source, target = other_model(5), fresh_model(4)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = start(target, source, ["a", "b", "c", "d"], ["e", "f", "g", "h", "i"])
    assert set(report.reinitialised) == {f"{HEAD}.weight", f"{HEAD}.bias"}
    assert set(report.reinitialised.values()) == {"no category name in common"}
    for name in report.reinitialised:
        assert torch.equal(target.state_dict()[name], before[name])
    assert len(report.copied) == len(before) - 3


@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True)])
def test_without_names_the_number_of_classes_decides(named: tuple[bool, bool]) -> None:
    def names(count: int, is_known: bool):
        return [f"n{i}" for i in range(count)] if is_known else None

    equal = fresh_model(5)
    report = start(equal, other_model(5), names(5, named[0]), names(5, named[1]))
    assert head_of(equal)[1].tolist() == [200, 201, 202, 203, 204, 205]
    assert report.needs_attention
    assert "taken to have the same classes in the same order" in str(report)
    other = fresh_model(4)
    before = head_of(other)[0].clone()
    report = start(other, other_model(5), names(4, named[0]), names(5, named[1]))
    assert torch.equal(head_of(other)[0], before)
    reason = report.reinitialised[f"{HEAD}.weight"]
    assert "5 classes in the file, 4 in the model" in reason
    assert ("MODEL.WEIGHTS_DATASET" in reason) == (not named[1])


def test_another_number_of_queries_re_initialises_these_alone() -> None:
    source, target = other_model(4, num_queries=11), fresh_model(4, num_queries=8)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = start(target, source, list("abcd"), list("abcd"))
    assert set(report.reinitialised) == QUERIES
    assert set(report.reinitialised.values()) == {"11 queries in the file, 8 in the model"}
    for name, tensor in target.state_dict().items():
        expected = before[name] if name in QUERIES or name == EMPTY else source.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_backbone_weights_leave_the_rest_as_it_was() -> None:
    source, target = other_model(), fresh_model()
    state = {**source.backbone.state_dict(), "head.weight": torch.zeros(2, 2)}
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = load_start(target, {"model": state, "matching_heuristics": True}, categories=list("abcd"))
    assert report.unused == ("head.weight",)
    assert len(report.copied) == len(state) - 1
    assert set(report.missing) == {name for name in before if not name.startswith(("backbone.", "criterion."))}
    assert report.from_config == (EMPTY,)
    for name in report.missing:
        assert torch.equal(target.state_dict()[name], before[name])
    assert "not in the file, re-initialised: sem_seg_head.pixel_decoder (" in str(report)


def test_names_of_the_first_releases_are_adapted_too() -> None:
    source, target = other_model(5), fresh_model(4, num_queries=9)
    old = {n.replace("_head.pixel_decoder.", "_head.").replace("query_feat", "static_query"): t
           for n, t in source.state_dict().items()}  # fmt: skip
    report = load_start(target, old, categories=list("abcd"), source_categories=list("edcba"))
    assert set(report.reinitialised) == QUERIES
    assert not report.missing
    assert head_of(target)[1].tolist() == [204, 203, 202, 201, 205]


def test_other_shapes_are_refused_and_nothing_is_changed() -> None:
    source, target = other_model(5), fresh_model(4)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = dict(source.state_dict())
    state["sem_seg_head.predictor.decoder_norm.weight"] = torch.ones(48)
    state[f"{HEAD}.weight"] = torch.ones(6, 48)
    with pytest.raises(ValueError, match="another architecture") as caught:
        load_start(target, state)
    for words in ("decoder_norm.weight (48,) in the file, (32,) in the model", f"{HEAD}.weight (6, 48) in the file"):
        assert words in str(caught.value)
    assert_equal_states(target.state_dict(), before)


@pytest.mark.parametrize(
    ("names", "source_names", "match"),
    [
        (["a"], list("abcde"), "categories must be one for each of the model's 4 classes, got 1"),
        (list("abcd"), list("abcd"), "MODEL.WEIGHTS_DATASET must name a data set of the 5 classes of the state dict"),
    ],
)
def test_names_must_be_as_many_as_classes(names: list[str], source_names: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_start(fresh_model(4), other_model(5).state_dict(), categories=names, source_categories=source_names)


def test_a_file_without_a_fitting_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor that the model could take, only x, y"):
        load_start(fresh_model(), {"x": torch.ones(1), "y": torch.ones(1)})


def test_a_model_file_names_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model_file(path, other_model(), ModelDescription(architecture=architecture(), categories=categories()))
    target = fresh_model(2)
    report = load_start(target, path, categories=["CLASS 2 é", "else"])
    assert head_of(target)[1].tolist()[::2] == [202, 204]
    assert report.categories is not None
    assert report.categories.kept == ("CLASS 2 é",)
    report = load_start(fresh_model(2), str(path), categories=["b", "x"], source_categories=list("abcd"))
    assert report.categories is not None
    assert report.categories.kept == ("b",)  # what the user says counts


def test_a_checkpoint_of_a_training_names_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    own = {"categories": ["cat", None, "dog", "cow"], "seed": 1}
    torch.save({"model": other_model().state_dict(), OWN_ENTRY: own}, path)
    target = fresh_model(2)
    report = load_start(target, path, categories=[None, "dog"])
    assert head_of(target)[1].tolist()[1:] == [202, 204]
    assert report.categories is not None
    assert report.categories.new == (None,)
    assert "1 categories new: one without a name" in str(report)


def test_half_precision_files_are_copied_in_the_model_s_precision() -> None:
    source, target = other_model(5), fresh_model(4)
    load_start(target, source.half().state_dict(), categories=list("abcd"), source_categories=list("abxyz"))
    assert head_of(target)[0].dtype == torch.float32
    assert head_of(target)[1].tolist()[:2] == [200, 201]


def test_parts_are_grouped_and_long_lists_are_shortened(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"name {i}" for i in range(40)]
    report = start(fresh_model(40), other_model(40), [*names[:30], *map(str, range(10))], names)
    text = str(report)
    assert "30 categories kept: name 0, " in text
    assert "name 19 and 10 more" in text
    assert max(len(line) for line in text.splitlines()) < 300
    with caplog.at_level(logging.INFO):
        logging.getLogger("mask2former").info("%s", report)
    assert "tensors copied" in caplog.text
