"""`AuditReport`: findings, tables and figures, as Markdown, HTML and files."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from npti_interp._files import write_atomic, write_json
from npti_interp.audit._config import AuditConfig
from npti_interp.bench._schema import html_table
from npti_interp.runs import at_work_in, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AuditReport", "Finding", "Severity"]

Severity = Literal["error", "warning", "note"]

_TITLES = {
    "questions": "Questions by trait and split",
    "descriptions": "Descriptions by trait, pole and role",
    "checks": "Questions that break a rule, with 95 % Wilson intervals",
    "repeats": "Texts that repeat another (Jaccard index of word 3-grams)",
    "balance": "Balance of facets, keys and topics (χ² against equal shares)",
    "text": "Length and readability (means with 95 % intervals over questions)",
    "order": "Change of a measure along the file (CUSUM, permutation test, Holm)",
    "suspect": "With and without rows marked suspect (means with 95 % intervals over questions)",
    "discrimination": "Persona-prompted answers told apart, by trait (95 % intervals over questions)",
    "discrimination_questions": "… and by question (95 % intervals over pairs of personas)",
    "levels": "Questions by facet, key and topic",
}
_MOST_ROWS = 40
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:.8rem;display:block;overflow-x:auto}
th,td{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #eee;vertical-align:top}
img{max-width:100%;display:block;margin:1rem auto}figure{margin:1rem 0}figcaption{font-size:.85rem;color:#555}
.error{color:#fff;background:#b2182b}.warning{background:#fdb863}.note{background:#e0e0e0}
.tag{border-radius:.3rem;padding:0 .4rem;font-size:.75rem}code{font-size:.8rem}
"""


@dataclass(frozen=True)
class Finding:
    """Something that an audit found.

    Attributes:
        severity: ``error``: numbers from this set are wrong; ``warning``: they are biased or weaker; ``note``: worth
            knowing.
        code: short name, the same in every report.
        message: what was found.
        count: how many (rows, poles, places, as the message says); None where nothing is counted.
        of: out of how many; None where that has no meaning.
        ids: the questions or descriptions, if any.
    """

    severity: Severity
    code: str
    message: str
    count: int | None = None
    of: int | None = None
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.severity}: {self.told}"

    @property
    def told(self) -> str:
        """Count and message."""
        counted = "" if self.count is None else f"{self.count}{'' if self.of is None else f' of {self.of}'}: "
        return counted + self.message


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        findings: errors, then warnings, then notes.
        tables: by name: ``questions, descriptions, levels`` (counts), ``repeats``, ``checks`` (answer format, leakage),
            ``balance``, ``text`` (length, readability), ``order``, ``suspect`` (with and without such rows) and, with
            a model, ``discrimination`` and ``discrimination_questions``.
        rows: a row a question with all that was measured of it; no texts.
        config: the settings.
        facts: the set's name, source and digest, numbers of rows, how syllables were counted, versions.
    """

    findings: tuple[Finding, ...]
    tables: Mapping[str, pd.DataFrame]
    rows: pd.DataFrame
    config: AuditConfig
    facts: Mapping[str, Any]

    def of(self, severity: Severity) -> list[Finding]:
        """Findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    def __getitem__(self, code: str) -> Finding:
        """The first finding of that code.

        Raises:
            KeyError: nothing of the kind was found.
        """
        for finding in self.findings:
            if finding.code == code:
                return finding
        raise KeyError(code)

    def exit_code(self, *, strict: bool = False) -> int:
        """0 for a clean set, 1 where there are errors, or with ``strict`` warnings."""
        return int(bool(self.of("error") or (strict and self.of("warning"))))

    def _head(self) -> str:
        n = {s: len(self.of(s)) for s in ("error", "warning", "note")}
        told = ", ".join(f"{k} {s}{'' if k == 1 else 's'}" for s, k in n.items())
        return (
            f"{told}. {self.facts['questions']} questions and {self.facts['descriptions']} descriptions from "
            f"{self.facts['source']}, digest {self.facts['digest'][:8]}."
        )

    def __str__(self) -> str:
        return "\n".join([f"Audit of {self.facts['name']}: {self._head()}", *(f"  {f}" for f in self.findings)])

    def summary(self) -> str:
        """The findings and tables in Markdown; long tables are cut, with the name of their file."""
        lines = [f"# Audit of {self.facts['name']}", "", self._head(), "", "## Findings", ""]
        lines += [f"- **{f.severity}** `{f.code}` {f.told}{_named(f)}" for f in self.findings] or ["Nothing was found."]
        for name in self._told():
            table = self.tables[name]
            lines += ["", f"## {_TITLES[name]}", "", _markdown(table.head(_MOST_ROWS))]
            if len(table) > _MOST_ROWS:
                lines += ["", f"{len(table) - _MOST_ROWS} more rows are in {name}.csv."]
        return "\n".join([*lines, "", self._how(), ""])

    def _told(self) -> list[str]:
        return [n for n in _TITLES if n in self.tables and len(self.tables[n])]

    def _how(self) -> str:
        return (
            f"Near repeats: Jaccard index of word 3-grams of at least {self.config.similarity}. Syllables: "
            f"{self.facts['syllables_by']}. Seed {self.config.seed}, {self.config.permutations} permutations. Wording is "
            "judged by patterns made for English."
        )

    def figures(self) -> dict[str, tuple[Figure, pd.DataFrame]]:
        """Figures by name, each with the data that was plotted."""
        from npti_interp.figures import _audit

        balance: Any = self.tables["balance"]
        made = {
            "audit_checks": _audit.plot_audit_checks(self.tables["questions"], self.tables["checks"]),
            "audit_order": _audit.plot_audit_order(self.rows, self.tables["order"], self.config.alpha),
        }
        if balance["deviation"].notna().any():
            made["audit_balance"] = _audit.plot_audit_balance(self.tables["levels"])
        if "discrimination" in self.tables:
            made["audit_discrimination"] = _audit.plot_audit_discrimination(
                self.tables["discrimination_questions"], self.tables["discrimination"]
            )
        return made

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``report.md``, ``report.html`` (one file, figures inside), ``findings.json``, tables and figures.

        Tables are CSV, what was measured of each question ``rows.parquet``. Files of an earlier audit are replaced.

        Returns:
            the files.

        Raises:
            RunFolderError: another process is at work in the folder.
        """
        from npti_interp.figures import save_figure

        figures = self.figures()
        with at_work_in(folder) as base:
            settings = {"config": asdict(self.config), "digest": self.facts["digest"]}
            written: list[Path] = []
            for stem, (figure, data) in figures.items():
                written += save_figure(figure, base / "figures" / stem, data, settings)
            pictures = {stem: base / "figures" / f"{stem}.png" for stem in figures}
            shown = "".join(f"\n![{_CAPTIONS[stem]}](figures/{stem}.png)\n" for stem in figures)
            texts = {"report.md": f"{self.summary()}\n## Figures\n{shown}", "report.html": self._page(pictures)}
            texts |= {f"{name}.csv": own.to_csv(index=False, lineterminator="\n") for name, own in self.tables.items()}
            for name, text in texts.items():
                write_atomic(base / name, lambda scratch, text=text: scratch.write_text(text, encoding="utf-8"))
                written.append(base / name)
            write_table(base / "rows.parquet", self.rows)
            about = {
                "errors": len(self.of("error")), "warnings": len(self.of("warning")),
                "findings": [asdict(f) for f in self.findings], "facts": dict(self.facts), "config": asdict(self.config),
            }  # fmt: skip
            write_json(base / "findings.json", about)
            return [*written, base / "rows.parquet", base / "findings.json"]

    def _listed(self) -> str:
        rows = "".join(
            f'<tr><td><span class="tag {f.severity}">{f.severity}</span></td><td><code>{html.escape(f.code)}</code></td>'
            f"<td>{html.escape(f.told + _named(f))}</td></tr>"
            for f in self.findings
        )
        return f"<table><tbody>{rows}</tbody></table>" if rows else "<p>Nothing was found.</p>"

    def _page(self, pictures: Mapping[str, Path]) -> str:
        title = f"Audit of {html.escape(str(self.facts['name']))}"
        parts = [f"<h1>{title}</h1><p>{html.escape(self._head())}</p><h2>Findings</h2>{self._listed()}<h2>Figures</h2>"]
        for stem, path in pictures.items():
            image = base64.b64encode(path.read_bytes()).decode()
            caption = html.escape(_CAPTIONS[stem])
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'
            )
        for name in self._told():
            table = self.tables[name]
            parts.append(f"<h2>{html.escape(_TITLES[name])}</h2>{_html(table.head(_MOST_ROWS))}")
            if len(table) > _MOST_ROWS:
                parts.append(f"<p>{len(table) - _MOST_ROWS} more rows are in {name}.csv.</p>")
        parts.append(f"<p>{html.escape(self._how())}</p>")
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
            f"{''.join(parts)}</body></html>\n"
        )

    def _repr_html_(self) -> str:
        counts = _html(self.tables["questions"])
        return (
            f"<p><b>{html.escape(str(self.facts['name']))}</b>: {html.escape(self._head())}</p>{self._listed()}{counts}"
        )


_CAPTIONS = {
    "audit_checks": "Questions by trait and split, and the share that breaks a rule (95 % Wilson intervals).",
    "audit_order": "Words of each question along the file; suspect rows are shaded, lines mark a significant change.",
    "audit_balance": "Share of each facet and key, relative to an equal share.",
    "audit_discrimination": "Rating under high personas minus rating under low ones, a point a question, 95 % intervals.",
}


def _named(finding: Finding, most: int = 12) -> str:
    """Some ids, where the message does not name them."""
    if not finding.ids or finding.ids[0] in finding.message:
        return ""
    more = f" and {len(finding.ids) - most} more" if len(finding.ids) > most else ""
    return f" [{', '.join(finding.ids[:most])}{more}]"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """A column with ``_low`` and ``_high`` beside it becomes one: value [low, high]."""
    ends = {f"{c}{end}" for c in table.columns for end in ("_low", "_high") if f"{c}_low" in table.columns}
    columns = [str(c) for c in table.columns if c not in ends]
    rows = [
        [
            f"{_cell(record[c])} [{_cell(record[f'{c}_low'])}, {_cell(record[f'{c}_high'])}]"
            if f"{c}_low" in ends
            else _cell(record[c])
            for c in columns
        ]
        for record in table.to_dict("records")
    ]
    return columns, rows


def _markdown(table: pd.DataFrame) -> str:
    columns, rows = _cells(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


def _html(table: pd.DataFrame) -> str:
    return html_table(*_cells(table))
