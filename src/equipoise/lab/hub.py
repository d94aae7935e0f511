"""Text from a data set of the Hugging Face hub, by name."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.capture.text import Document
from equipoise.errors import EquipoiseError, nearest
from equipoise.lab.config import DataConfig


def load_dataset_text(config: DataConfig) -> Sequence[Document]:
    """The documents of `data.source`, "owner/name" or "owner/name:configuration".

    A row's domain is its `data.domain_field`, or the data set's name. Raises EquipoiseError where
    the `datasets` package, the data set or a field is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise EquipoiseError(
            f"{_nowhere(config)} To load it as a data set: pip install 'equipoise[datasets]'."
        ) from error
    name, _, part = config.source.partition(":")
    try:
        rows = datasets.load_dataset(name, part or None, split=config.split)
    except Exception as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise EquipoiseError(f"{_nowhere(config)} As a data set: {said}") from error
    for field in (config.text_field, config.domain_field):
        if field is not None and field not in rows.column_names:
            raise EquipoiseError(
                f"data set {name} has no field {field!r}: there are {', '.join(rows.column_names)}."
                f"{nearest(field, rows.column_names)}"
            )
    default = name.rpartition("/")[2]
    return [
        Document(
            default if config.domain_field is None else str(row[config.domain_field]),
            str(number),
            _text_of(row[config.text_field], number, config),
        )
        for number, row in enumerate(rows)
        if row[config.text_field] not in (None, "")
    ]


def _nowhere(config: DataConfig) -> str:
    return (
        f"data.source={config.source!r} is no file or folder here: name a folder of text, a sub-folder "
        "or file for each domain (train: --set data.source=FOLDER; lab: --data FOLDER)."
    )


def _text_of(value: object, number: int, config: DataConfig) -> str:
    if not isinstance(value, str):
        raise EquipoiseError(
            f"data set {config.source}, row {number}: {config.text_field!r} is a "
            f"{type(value).__name__}, not a text; name another field with data.text_field."
        )
    return value
