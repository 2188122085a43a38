"""The tables of docs/published_models.md, made from the list of models.

After a change of the list: ``python -m tests.model_tables``.
"""

from itertools import groupby
from pathlib import Path, PurePosixPath

from mask2former.zoo import MODELS, PublishedModel

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/published_models.md"
BEGIN, END = "<!-- made by tests/model_tables.py -->\n", "<!-- end of what it makes -->\n"


def tables() -> str:
    """One table for each data set and task."""
    groups = groupby(MODELS.values(), key=lambda model: model.config.split("/")[:2])
    return "\n".join(_table("/".join(folder), list(models)) for folder, models in groups)


def with_tables(text: str) -> str:
    """The document with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


def _table(folder: str, models: list[PublishedModel]) -> str:
    head = [f"`configs/{folder}/`", "parameters", *models[0].scores, "name", "checkpoint"]
    lines = [head, ["---"] * len(head), *(_row(folder, model) for model in models)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- |", "|---|").replace(" --- |", "---|")


def _row(folder: str, model: PublishedModel) -> list[str]:
    return [
        f"`{PurePosixPath(model.config).relative_to(folder)}`",
        f"{model.million_parameters:.1f} M",
        *(f"{score:.1f}" for score in model.scores.values()),
        f"`{model.name}`",
        f"[{model.sha256_prefix}]({model.url})",
    ]


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), "utf-8")
