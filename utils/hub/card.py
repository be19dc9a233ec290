"""The model card: what a reader of the repository sees first. Made from the runs alone, so it stays the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from configs.defaults import Config
from utils.hub.facts import HEADLINE, SharedRun
from utils.plots.summary import format_time, markdown_rows, markdown_table, summarize
from utils.preflight.config import to_dict
from utils.preflight.model_files import is_local


def model_card(repo: str, runs: Sequence[SharedRun], figure: str | None) -> str:
    """README.md: front matter, the curve, results, how to load the weights, the command and the evaluation."""
    name, first = repo.rpartition("/")[2], runs[0]
    picture = [f"![rewards over GRPO steps]({figure})", ""] if figure else []
    body = _one_run(first) if first.place == "." else _many_runs(runs)
    head = [*_front_matter(runs), f"# {name}", "", *_what_it_is(runs)]
    return "\n".join([*head, *picture, *body, *_loading(repo, first)])


def _front_matter(runs: Sequence[SharedRun]) -> list[str]:
    bases = sorted({run.config["paths"]["model_path"] for run in runs})
    hub_bases = [base for base in bases if not is_local(base)]
    library = "transformers" if runs[0].base is None else "peft"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- grpo", "- rlvr"]
    lines += ["base_model:", *(f"- {json.dumps(base)}" for base in hub_bases)] if hub_bases else []
    return [*lines, "---", ""]


def _what_it_is(runs: Sequence[SharedRun]) -> list[str]:
    paths = runs[0].config["paths"]
    what = "One run of" if len(runs) == 1 else f"{len(runs)} runs of"
    return [
        f"{what} GRPO (Group Relative Policy Optimization) with verifiable rewards, from `{paths['model_path']}` on "
        f"`{paths['train_data_file']}`. [metadata.json](metadata.json) holds all parameters, the commit, the versions.",
        "",
    ]


def _one_run(run: SharedRun) -> list[str]:
    facts = run.metadata()
    rows = [("checkpoint", "folder", "GRPO step", HEADLINE)]
    for name in ("best", "last"):
        if name in facts:
            saved = facts[name]
            rows.append((name, f"`{saved['folder']}`", str(saved["step"]), _number(saved[HEADLINE])))
    t = run.config["training"]
    return [
        markdown_rows(rows),
        "",
        f"It ended as `{facts['ended']}` after {facts['steps']} GRPO steps of {t['rollout_batch_size']} rollouts, in "
        f"{format_time(facts['seconds'])}. `{HEADLINE}` is measured on held-out problems while it trains.",
        "",
        *_evaluations(run),
        "## How it was made",
        "",
        "```bash",
        facts["command"],
        "```",
        "",
        f"Commit `{facts['commit']}`{' with uncommitted changes' if facts['uncommitted_changes'] else ''}, "
        f"on {', '.join(facts['gpus'] or []) or 'a CPU'}; "
        + ", ".join(f"{name} {version}" for name, version in (facts["packages"] or {}).items() if version)
        + ".",
        "",
        "What differs from the defaults:",
        "",
        markdown_rows([("field", "value"), *_unlike_the_defaults(run.config)]),
        "",
    ]


def _many_runs(runs: Sequence[SharedRun]) -> list[str]:
    summaries, _ = summarize([run.curves for run in runs])
    rows = [("run", "checkpoints", "ended")]
    for run in runs:
        facts = run.metadata()
        saved = ", ".join(
            f"{name}: step {facts[name]['step']}, {_number(facts[name][HEADLINE])}"
            for name in ("best", "last")
            if name in facts
        )
        rows.append((f"`{run.place}`", saved, facts["ended"]))
    evaluations = [line for run in runs for line in _evaluations(run, f" of `{run.place}`")]
    commands = ["## How they were made", "", "```bash", *dict.fromkeys(run.command for run in runs), "```", ""]
    return [markdown_table(summaries), "", markdown_rows(rows), "", *evaluations, *commands]


def _evaluations(run: SharedRun, of_what: str = "") -> list[str]:
    lines = []
    for name, sets in run.evaluations.items():
        rows = [("data", "round", "problems", "reward", "pass@k")]
        for data, rounds in sets.items():
            for round_name, figures in rounds.items():
                reward = f"{figures['reward']:.4f} ± {figures['reward_std_error']:.4f}"
                passed = ", ".join(f"pass@{k} {value:.4f}" for k, value in figures["pass_at_k"].items())
                rows.append((f"`{data}`", round_name, f"{figures['problems']:,}", reward, passed))
        lines += [f"## Evaluation of the {name} checkpoint{of_what}", "", markdown_rows(rows), ""]
        lines += ["Means over problems, with their standard errors.", ""]
    return lines


def _unlike_the_defaults(config: dict[str, Any]) -> list[tuple[str, str]]:
    defaults = to_dict(Config())
    return [
        (f"`{section}.{name}`", f"`{json.dumps(value)}`")
        for section, fields in config.items()
        for name, value in fields.items()
        if defaults.get(section, {}).get(name) != value
    ]


def _loading(repo: str, run: SharedRun) -> list[str]:
    name, (_, folder) = next(iter(run.checkpoints().items()))
    subfolder = "" if folder == "." else f', subfolder="{folder}"'
    return [
        f"## Loading the {name} checkpoint" + (f" of `{run.place}`" if run.place != "." else ""),
        "",
        "```python",
        *([] if run.base is None else ["from peft import PeftModel"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{run.base or repo}"{subfolder if run.base is None else ""})',
        *([] if run.base is None else [f'model = PeftModel.from_pretrained(model, "{repo}"{subfolder})']),
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{subfolder})',
        "```",
        "",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
