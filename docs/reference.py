"""The reference as Markdown: every plugin from the registry, every command from click.

Pages are made when the site is built and are kept nowhere else: they hold what `advplug info` and `--help` say.
Neither mkdocs nor torch is needed to make them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import click

from advplug import hooks
from advplug.cli import cli
from advplug.registry import Entry, Registry, registry
from generate import own

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
INTRODUCTIONS = {
    "attack": "Attacks on images and on training data, named by `-a`. `eps=`, `norm=` and `target=` are part of the "
    "threat and can be given to any of them. What the words mean: [Attacks](../attacks.md), "
    "[Threat models](../threats.md), [Poisoning](../poisoning.md).",
    "defense": "Defenses, named by `-d`; `a+b` stacks two. How each is attacked and what was measured of them: "
    "[Defenses](../defenses.md), [CLIP](../clip.md), [Poisoning](../poisoning.md).",
    "model": "Models, named by `-m`. See [Hubs](../hubs.md) and [CLIP](../clip.md).",
    "dataset": "Datasets, named by `--dataset`. See [Captions](../captions.md).",
    "metric": "What is measured of every cell. Metrics are not chosen: all that apply are computed.",
    "tracker": "Where finished runs go, named by `--track`. See [Results](../results.md#experiment-trackers).",
}


def pages() -> dict[str, str]:
    """Markdown by its path in the site: an index, a page a kind of plugin, and the command line."""
    known = own(registry())
    made = {f"reference/{kind}s.md": kind_page(known, kind) for kind in hooks.KINDS}
    lines = [
        "# Reference",
        "",
        "Made from the installed version when this site was built: the same that `advplug info` and `--help` say.",
        "",
        *(f"- [{kind.capitalize()}s]({kind}s.md): {len(known.entries(kind))}" for kind in hooks.KINDS),
        "- [Command line](cli.md): every command with every flag",
    ]
    return {"reference/index.md": "\n".join(lines) + "\n", **made, "reference/cli.md": commands_page()}


# --- plugins -----------------------------------------------------------------------------------------


def kind_page(known: Registry, kind: str) -> str:
    """All plugins of a kind, those of a distribution together; what differs in its name alone is told once."""
    by_source: dict[str, list[Entry]] = {}
    for entry in known.entries(kind):
        by_source.setdefault(entry.source.distribution, []).append(entry)
    lines = [f"# {kind.capitalize()}s", "", INTRODUCTIONS[kind]]
    for source, entries in sorted(by_source.items()):
        lines += ["", f"## {source}"]
        for group in _alike(entries):
            lines += ["", *_entry(group, known.tables[kind])]
    return "\n".join(lines) + "\n"


def _alike(entries: Iterable[Entry]) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        told = entry.describe()
        groups.setdefault(repr([told["summary"], told["paper"], told["caps"], told["params"]]), []).append(entry)
    return list(groups.values())


def _entry(group: list[Entry], names_of_kind: Collection[str]) -> list[str]:
    told = group[0].describe()
    names = [e.name for e in group]
    title = f"`{names[0]}`" if len(names) == 1 else f"`{names[0]}` to `{names[-1]}`"
    summary = told["summary"]
    if summary.split()[0] not in names_of_kind:
        summary = summary[0].upper() + summary[1:]
    lines = [f"### {title} {{ #{slug(names[0])} }}", "", f"{_text(summary)}."]
    if len(names) > 1:
        lines += ["", f"All of these: {', '.join(f'`{name}`' for name in names)}."]
    if told["paper"]:
        lines += ["", f"Paper: {_linked(told['paper'])}."]
    shown = [f"{name.replace('_', ' ')} {_value(v)}" for name, v in told["caps"].items() if v not in (None, [], False)]
    if shown:
        lines += ["", f"Capabilities: {'; '.join(shown)}."]
    if not told["params"]:
        return [*lines, "", "No parameters."]
    head = ["| parameter | type | default | bounds | what it is |", "|---|---|---|---|---|"]
    return [*lines, "", *head, *(_parameter(p) for p in told["params"])]


def _value(value: Any) -> str:
    if value is True:
        return "yes"
    return _text(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _parameter(told: dict[str, Any]) -> str:
    kind = " or ".join(f"`{c}`" for c in told["choices"]) if told["choices"] else told["type"]
    bounds = " and ".join(f"{SIGNS[k]} {v:g}" for k, v in told["bounds"].items())
    default = "required" if told["required"] else f"`{_default(told['default'])}`"
    return f"| `{told['name']}` | {kind} | {default} | {bounds} | {_text(told['help'])} |"


def _default(value: Any) -> str:
    """As one writes it in a reference."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ":".join(map(str, value))
    return str(value) if value != "" else "''"


# --- commands ----------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and flags."""
    lines = [
        "# Command line",
        "",
        "Results go to standard output, everything else to standard error. Exit codes: 0 all is well, 1 a gate failed, "
        "2 the input cannot be used, 3 some cells failed, 4 a fault of advplug, 130 interrupted.",
    ]
    for path, command in _commands(cli, ("advplug",)):
        lines += ["", *_command(path, command)]
    return "\n".join(lines) + "\n"


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], (*path, name))


def _command(path: tuple[str, ...], command: click.Command) -> list[str]:
    context = click.Context(command, info_name=" ".join(path))
    title = " ".join(path)
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    lines = [f"## {title} {{ #{slug(title)} }}", "", "```text", usage, "```", "", *_prose(command.help or "")]
    if isinstance(command, click.Group):
        below = [f"[{n}](#{slug(f'{title} {n}')})" for n in sorted(command.commands)]
        lines += ["", f"Commands: {', '.join(below)}."]
    rows = [_flag(p, context) for p in command.params if isinstance(p, click.Option)]
    return [*lines, "", "| flag | what it does |", "|---|---|", *rows] if rows else lines


def _flag(option: click.Option, context: click.Context) -> str:
    names, told = option.get_help_record(context) or ("", "")
    again = " Can be repeated." if option.multiple else ""
    return f"| `{names.replace('|', chr(92) + '|')}` | {_text(told)}{again} |"


def _prose(text: str) -> list[str]:
    """Help as Markdown; a paragraph that click keeps as it stands becomes a block."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        kept = paragraph.startswith("\b\n")
        parts.append(f"```text\n{paragraph[2:]}\n```" if kept else _text(paragraph))
    return "\n\n".join(parts).splitlines()


# --- texts -------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")


def _text(text: str) -> str:
    """Plain text that Markdown leaves alone."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def _linked(paper: str) -> str:
    """The numbers of arXiv as links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", _text(paper))


def main() -> None:
    """Says how large the pages are; to look at one: `python docs/reference.py attacks`."""
    import sys

    for path, text in pages().items():
        if PurePosixPath(path).stem in sys.argv[1:]:
            click.echo(text)
        else:
            click.echo(f"{path}: {len(text):,} characters", err=True)


if __name__ == "__main__":
    main()
