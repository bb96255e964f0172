"""Writes the report as one HTML file without scripts and external resources.

Each figure is a link to the command that measured it. A figure that is computed from two measurements has two links.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from bench.reproduce.html_tables import (
    STYLE,
    Cell,
    TableRenderer,
    TableRow,
    format_rate,
    format_seconds,
    format_share,
    format_value,
    plural,
)

Document = Mapping[str, Any]
MAX_DRIFT = 0.25  # of a machine whose figures can be trusted


def render_html(report: Document) -> str:
    commands = {step["id"]: step["command"] for step in report["steps"]}
    renderer = TableRenderer(commands)
    sections = (
        ("What was measured", _introduction(report)),
        ("Summary", _summary(report, renderer)),
        ("Where PARSE loses", _losses(report, renderer)),
        ("Requests per second", _throughput(report, renderer)),
        ("Latency and correct answers under load", _latency(report, renderer)),
        (f"Requests per second and {report['unit']} within a latency bound", _per_unit(report, renderer)),
        ("Quality: each mode against mode off, on the same problems", _quality(report, renderer)),
        ("Noise of the machine", _noise(report, renderer)),
        ("What is missing", _missing(report, renderer)),
        ("Environment", _environment(report)),
        ("Servers", _servers(report)),
        ("Commands", _steps(report)),
    )
    body = "\n".join(f"<section><h2>{escape(title)}</h2>\n{content}</section>" for title, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>PARSE and vLLM on equal hardware</title><style>{STYLE}</style></head>\n"
        f"<body><h1>PARSE and vLLM on equal hardware</h1>\n{body}\n</body></html>\n"
    )


def _paragraphs(*texts: str) -> str:
    return "".join(f"<p>{text}</p>\n" for text in texts)


def _introduction(report: Document) -> str:
    unit, allocation, tasks = report["unit"], report["allocation"], report["tasks"]
    load = f"the problems of {tasks['prompts']}" if tasks["prompts"] else "generated problems of the demo task"
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return (
        _paragraphs(
            f"A target model is served by vLLM alone and by PARSE, whose replicas run it in vLLM too. The target has "
            f"{allocation['target']} {unit}{plural(allocation['target'])}, and PARSE with its draft model uses "
            f"{allocation['total']}. Baselines whose names contain <code>all-{unit.lower()}s</code> use as many as "
            "PARSE. A number of clients sends requests, each client its next one when it has an answer. All "
            f"contenders answer the same problems in the same order: {escape(load)}.",
            "Every figure is a link to the command that measured it. A figure with &divide; compares two measurements, "
            "and the sign links to the second one.",
        )
        + f"<ul>{notes}</ul>"
    )


def _summary(report: Document, renderer: TableRenderer) -> str:
    rows = []
    for entry in report["summary"]:
        parse, baseline, ratio = entry["parse"], entry["baseline"], entry.get("ratio")
        steps = tuple(figure["step"] for figure in (parse, baseline) if figure)
        noise = entry["noise"]
        noise_cell = Cell(f"±{abs(noise['drift']):.0%}", tuple(noise["steps"])) if noise else Cell("unknown")
        cells = [Cell(str(entry["clients"]))]
        for figure in (parse, baseline):
            if figure is None:
                cells += [Cell("not measured", css_class="text"), Cell(""), Cell("")]
                continue
            own_step = (figure["step"],)
            correct = format_share(figure["accuracy"], figure["accuracy_interval"])
            cells += [
                Cell(figure["contender"], css_class="text"),
                Cell(format_rate(figure["requests_per_s"]), own_step),
                Cell(correct, own_step if correct else ()),
            ]
        cells.append(Cell("" if ratio is None else f"{ratio:.2f}", steps, "bad" if (ratio or 1) < 1 else ""))
        rows.append(TableRow([*cells, noise_cell]))
    drift = max((abs(entry["drift"]) for entry in report["noise"]), default=0.0)
    warning = (
        '<p class="bad">The machine was not quiet: the same measurement differed by more than a quarter. Do not trust '
        "figures of this report.</p>\n"
    )
    columns = "requests/s", "correct"
    names = "clients", "fastest mode of PARSE", *columns, "fastest baseline", *columns, "ratio", "noise"
    return (
        (warning if drift > MAX_DRIFT else "")
        + renderer.table(names, rows)
        + _paragraphs(
            "A ratio above 1 means that PARSE answers more requests per second than the best of the baselines, all of "
            f"which use at most as many {report['unit']}s. Both are the best of several contenders, measured in this "
            "run. Mode off does not count as a mode of PARSE here. The noise is the difference between two "
            "measurements of the target alone; a ratio that is not further from 1 says nothing. Drafted answers can be "
            "shorter than those of the target, which raises the requests per second, so compare the tokens per second "
            "below too."
        )
    )


def _losses(report: Document, renderer: TableRenderer) -> str:
    if not report["losses"]:
        measured = any(entry.get("ratio") is not None for entry in report["summary"])
        return _paragraphs("No such case was measured." if measured else "Too little was measured to tell.")
    rows = []
    for loss in report["losses"]:
        is_share = loss["kind"].startswith("correct answers")
        steps = loss["steps"]
        rows.append(
            TableRow(
                [
                    Cell("" if loss["clients"] is None else str(loss["clients"])),
                    Cell(loss["kind"], css_class="text"),
                    Cell(loss["contender"], css_class="text"),
                    Cell(format_value(loss["value"], is_share), tuple(steps[:1])),
                    Cell(loss["against"], css_class="text"),
                    Cell(format_value(loss["against_value"], is_share), tuple(steps[-1:])),
                    Cell("" if loss["ratio"] is None else f"{loss['ratio']:.2f}", tuple(steps), "bad"),
                    Cell("within the noise" if loss["within_noise"] else "", css_class="text"),
                ]
            )
        )
    names = "clients", "figure", "PARSE", "", "better", "", "ratio", ""
    number = len(rows)
    return (
        _paragraphs(f"{number} case{plural(number)}. What counts as one is explained below the table.")
        + renderer.table(names, rows)
        + _paragraphs(
            "The list is computed from the figures below: every baseline on no more hardware that is faster than the "
            "fastest mode, every mode that is slower than the target alone, a later first token of the mode that sends "
            "it first, and correct answers lost beyond the 95% interval."
        )
    )


def _throughput(report: Document, renderer: TableRenderer) -> str:
    clients = report["clients"]
    cells = {(cell["contender"], cell["clients"]): cell for cell in report["load"]}
    ok = [cell for cell in report["load"] if cell["status"] == "ok"]
    highest = {n: max((cell["requests_per_s"] for cell in ok if cell["clients"] == n), default=0) for n in clients}
    rows = []
    for name in dict.fromkeys(cell["contender"] for cell in report["load"]):
        own = [cells[name, n] for n in clients]
        figures = [_rate_cell(cell, highest[cell["clients"]]) for cell in own]
        rows.append(TableRow([Cell(name), Cell(str(own[0]["num_units"])), *figures], own[0]["kind"]))
    names = ["contender", f"{report['unit']}s", *(f"{n} client{plural(n)}" for n in clients)]
    return renderer.table(names, rows) + _paragraphs(
        "Requests per second: the median over the rounds, and the range of the rounds if there are several. Bars are "
        "relative to the fastest contender with the same number of clients."
    )


def _rate_cell(cell: Document, highest: float) -> Cell:
    if cell["status"] != "ok":
        return Cell(cell["status"], (cell["step"],), "bad")
    low, high = cell["requests_per_s_range"]
    text = format_rate(cell["requests_per_s"]) + (
        f" ({format_rate(low)} to {format_rate(high)})" if cell["rounds"] > 1 else ""
    )
    return Cell(text, (cell["step"],), share=cell["requests_per_s"] / highest if highest else 0.0)


def _latency(report: Document, renderer: TableRenderer) -> str:
    rows = []
    for cell in sorted(report["load"], key=lambda cell: int(cell["clients"])):
        if cell["status"] != "ok":
            continue
        steps = (cell["step"],)
        errors = ", ".join(f"{count} of {kind}" for kind, count in cell["errors"].items())
        figures = (
            f"{cell['requests']} in {cell['rounds']} round{plural(cell['rounds'])}",
            format_seconds(cell["ttft_p50_s"]),
            format_seconds(cell["latency_p50_s"]),
            format_seconds(cell["latency_p95_s"]),
            f"{cell['tokens_per_s']:.0f}",
            format_share(cell["accuracy"], cell["accuracy_interval"]),
            format_share(cell["accepted_share"], None),
        )
        rows.append(
            TableRow(
                [
                    Cell(cell["contender"]),
                    Cell(str(cell["clients"])),
                    *(Cell(text, steps if text else ()) for text in figures),
                    Cell(errors, steps if errors else (), "bad"),
                ],
                cell["kind"],
            )
        )
    names = (
        *("contender", "clients", "requests", "first token p50", "latency p50", "latency p95", "tokens/s"),
        *("correct answers", "draft accepted", "errors"),
    )
    return renderer.table(names, rows) + _paragraphs(
        "Intervals of correct answers are at 95%. Contenders of PARSE get the same problems as the baselines, but with "
        "other names or numbers in the prompts, so that none of them uses what is cached for another one. A small "
        "difference between two accuracies is therefore noise; the section on quality compares the same prompts."
    )


def _per_unit(report: Document, renderer: TableRenderer) -> str:
    bound, unit = report["latency_bound"], report["unit"]
    if bound["seconds"] is None:
        return _paragraphs(f"There is no bound: it is {escape(bound['source'])}.")
    rates = [entry["requests_per_s_per_unit"] or 0 for entry in report["rates_per_unit"]]
    rows = []
    for entry in sorted(report["rates_per_unit"], key=lambda entry: -(entry["requests_per_s_per_unit"] or 0)):
        cells = [Cell(entry["contender"]), Cell(str(entry["num_units"]))]
        if entry["step"] is None:
            cells += [Cell("meets it with no number of clients", css_class="text"), Cell(""), Cell("")]
        else:
            steps, rate = (entry["step"],), entry["requests_per_s_per_unit"]
            cells += [
                Cell(str(entry["clients"])),
                Cell(format_seconds(entry["latency_p95_s"]), steps),
                Cell(format_rate(rate), steps, share=rate / max(rates) if max(rates) else 0.0),
            ]
        rows.append(TableRow(cells, entry["kind"]))
    figure = renderer.figure(format_seconds(bound["seconds"]), [bound["step"]] if bound["step"] else [])
    names = "contender", f"{unit}s", "most clients", "latency p95", f"requests/s per {unit}"
    return _paragraphs(
        f"The bound of the 95th percentile of the latency is {figure}: {escape(bound['source'])}. Each contender "
        f"has its highest measured number of clients that meets the bound without errors. Its rate is divided by "
        f"all {unit}s that it uses."
    ) + renderer.table(names, rows)


def _quality(report: Document, renderer: TableRenderer) -> str:
    if not report["quality"]:
        return _paragraphs("Not measured.")
    rows = []
    for entry in report["quality"]:
        steps = (entry["step"],)
        cells = [Cell(entry["contender"]), Cell(entry["task"], css_class="text"), Cell(str(entry["num_problems"]))]
        has_scores = "accuracy" not in entry  # a judge scores the answers
        cells.append(Cell(f"{entry['mean_score']:.2f}" if has_scores else f"{entry['accuracy']:.1%}", steps))
        if entry["is_base"]:
            cells += [Cell("the base", css_class="text"), Cell(""), Cell(""), Cell("")]
        else:
            scale = 1 if has_scores else 100
            loss, low, high = (scale * value for value in (entry["loss"], *entry["loss_interval"]))
            cells += [
                Cell(f"{loss:.2f} points", steps, "bad" if low > 0 else ""),
                Cell(f"{low:.2f} to {high:.2f}", steps),
                Cell(f"{entry['p']:.3f}", steps),
                Cell(
                    format_share(entry.get("accepted_share"), None),
                    steps if entry.get("accepted_share") is not None else (),
                ),
            ]
        rows.append(TableRow(cells, "parse"))
    names = "contender", "task", "problems", "correct or score", "loss", "95% interval", "p", "draft accepted"
    return renderer.table(names, rows) + _paragraphs(
        "The loss is the share of correct answers that a mode loses, relative to mode off on the same prompts. If the "
        "interval contains zero, no loss is shown, but one of up to its upper end is possible. p is the probability of "
        "such a difference if there is none."
    )


def _noise(report: Document, renderer: TableRenderer) -> str:
    if not report["noise"]:
        return _paragraphs("The target alone was not measured twice, so the noise is unknown.")
    rows = []
    for entry in report["noise"]:
        repeated, first = entry["steps"]
        cells = [Cell(format_rate(entry["first"]), (first,)), Cell(format_rate(entry["repeated"]), (repeated,))]
        drifts = [
            Cell("" if drift is None else f"{drift:+.1%}", (repeated, first))
            for drift in (entry["drift"], entry["ttft_drift"])
        ]
        rows.append(TableRow([Cell(str(entry["clients"])), *cells, *drifts]))
    names = "clients", "target alone, requests/s", "again at the end", "drift", "drift of the first token"
    return renderer.table(names, rows)


def _missing(report: Document, renderer: TableRenderer) -> str:
    entries: list[tuple[str, str | None, tuple[str, ...]]]
    entries = [(omission["name"], omission["reason"], ()) for omission in report["omissions"]]
    entries += [(each["name"], each["reason"], (each["step"],) if each["step"] else ()) for each in report["failures"]]
    if not entries:
        return _paragraphs("Nothing: everything that was planned was measured, and no request failed.")
    rows = [TableRow([Cell(name, steps), Cell(reason or "", css_class="text")]) for name, reason, steps in entries]
    return renderer.table(("left out or failed", "reason"), rows)


def _environment(report: Document) -> str:
    entries = [
        f"<tr><td>{escape(name)}</td><td class='text'>{escape(str(value))}</td></tr>"
        for name, value in report["environment"].items()
    ]
    return (
        f'<div class="scroll"><table><tbody>{"".join(entries)}</tbody></table></div>'
        f"<details><summary>The configuration</summary><pre>{escape(report['config_text'])}</pre></details>"
    )


def _servers(report: Document) -> str:
    return "".join(
        f'<div id="server-{escape(server["name"])}"><p><strong>{escape(server["name"])}</strong>: '
        f"{escape(server['description'])} {server['num_units']} {report['unit']}{plural(server['num_units'])}. "
        f"{escape(_server_state(server))}</p><pre>{escape(server['command'])}</pre></div>\n"
        for server in report["servers"]
    )


def _server_state(server: Document) -> str:
    if server["failure"]:
        return f"It failed: {server['failure']}"
    return "" if server["ready_after_s"] is None else f"It was ready after {server['ready_after_s']:.0f} s."


def _steps(report: Document) -> str:
    return "".join(
        f'<div id="step-{escape(step["id"])}"><p><strong>{escape(step["id"])}</strong>, on server '
        f'<a href="#server-{escape(step["server"])}">{escape(step["server"])}</a>, {escape(step["started"])}, '
        f"{step['seconds']:.0f} s, {escape(step['status'])}"
        f"{escape(': ' + step['reason'] if step['reason'] else '')}</p><pre>{escape(step['command'])}</pre></div>\n"
        for step in report["steps"]
    )
