"""The tables of ``docs/configuration.md``, made from the schema so that they cannot grow old.

``python -m rae_xla.config.document docs/configuration.md`` brings the file up to date.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from rae_xla.config.model_params import DiTDHParams, LightningDiTParams, RAEParams
from rae_xla.config.run import RunConfig
from rae_xla.config.sections import ModelSpec
from rae_xla.config.typed import expected, section_of

START, END = "<!-- keys: made by rae_xla.config.document -->", "<!-- end of keys -->"
_MODELS = (
    ("Parameters of `stage1.RAE`", RAEParams),
    ("Parameters of `stage2.models.DDT.DiTwDDTHead` (DiT-DH)", DiTDHParams),
    ("Parameters of `stage2.models.lightningDiT.LightningDiT`", LightningDiTParams),
)


def key_tables() -> str:
    """Every key with its type, default and meaning, as Markdown: one table a section."""
    parts = []
    models = []
    for name, hint in get_type_hints(RunConfig, include_extras=True).items():
        section = cast(type, section_of(hint))
        if section is ModelSpec:
            models.append(name)
        else:
            parts.append(_table(f"`{name}`", section, _first_line(section), _rows(section)))
    names = " and ".join(f"`{n}`" for n in models)
    parts.insert(0, _table(names, ModelSpec, _first_line(ModelSpec), _rows(ModelSpec)))
    parts += [_table(title, cls, _first_line(cls), _rows(cls)) for title, cls in _MODELS]
    return "\n\n".join(parts)


def update(text: str) -> str:
    """``text`` with what stands between the two markers replaced by the tables of today."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{key_tables()}\n\n{END}{rest.split(END)[1]}"


def _table(title: str, section: type, intro: str, rows: list[str]) -> str:
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"### {title}", "", intro, "", *head, *rows])


def _rows(section: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(section, include_extras=True)
    rows: list[str] = []
    for field in dataclasses.fields(cast(Any, section)):
        hint = hints[field.name]
        inner = section_of(hint)
        if inner is not None and inner is not ModelSpec:
            rows += _rows(inner, f"{prefix}{field.name}.")
            continue
        annotated = get_origin(hint) is not None and hasattr(hint, "__metadata__")
        kind, meaning = get_args(hint) if annotated else (hint, "")
        words = "a model: target, params, ckpt; or null" if inner else expected(kind)
        rows.append(f"| `{prefix}{field.name}` | {words} | {_default(field)} | {meaning} |")
    return rows


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "(required)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{list(value)}" if isinstance(value, tuple) else f"{value}"


def _first_line(section: type) -> str:
    return (section.__doc__ or "").strip().split("\n", 1)[0]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page = Path(argument)
        page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
