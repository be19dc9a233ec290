"""Draw the page of the ablations' tiny world: what its runs can show at all, before any question is asked of them.

    python play-scripts/show_world.py             # from the runs in runs/world, whose commands the page names
    python play-scripts/show_world.py --redraw    # from the CSV files in results/world alone

writes results/world/: README.md with three pictures, and the metrics.csv and difficulty.csv that they are drawn from.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from train_sft import run_command

from utils.plots.figures import draw_figure, save_figure
from utils.plots.history import Run, load_runs, write_csv
from utils.plots.style import COLOURS, MARKERS, STYLE

KEPT = ("eval/reward", "eval/format_reward", "eval/answer_reward", "eval/mean_response_length", "train/reward")
KEPT += ("train/mean_response_length", "train/frac_truncated", "train/entropy")
USUAL = "usual"
COLLAPSES = {  # what makes them of `usual`
    "long": "training.learning_rate=1e-3 guard.action=stop",
    "short": "training.extra_rewards='{docs/examples/reward.py:brief: 100}'",
}
RUNS = (USUAL, *COLLAPSES)
STAGES = {"before": "warm start", "after": "after the run `usual`"}  # folders of evaluations: what they are of
ROUNDS = ("greedy", "sampled")
COLUMNS = ("stage", "decoding", "level", "problems", "reward", "std_error")
TRAIN = "python train_grpo.py --config configs/tiny/base.yaml"
EVALUATE = "python play-scripts/evaluate.py"
COMMANDS = "\n".join(
    [
        "python play-scripts/make_chains.py",
        f"{TRAIN} paths.output_dir=runs/world/{USUAL}",
        *(f"{TRAIN} {override} paths.output_dir=runs/world/{name}" for name, override in COLLAPSES.items()),
        f"{EVALUATE} data/chains/model --config configs/tiny/base.yaml --samples 8 --output runs/world/before",
        f"{EVALUATE} runs/world/{USUAL}/checkpoints/last --samples 8 --output runs/world/after",
        "python play-scripts/show_world.py",
    ]
)


def show(options: argparse.Namespace) -> None:
    """Write the page. Raises ValueError with the command for what is missing."""
    results = Path(options.results)
    if not options.redraw:
        collect(Path(options.runs), results)
    runs = {run.name: run for run in load_runs([results / "metrics.csv"])[0]}
    with (results / "difficulty.csv").open(newline="") as file:
        difficulty = list(csv.DictReader(file))
    lengths = ("eval/reward", "eval/format_reward", "eval/mean_response_length")
    draw(results / "lengths", [runs[USUAL]], lengths, "Length moves: the usual run")
    collapses = ("eval/answer_reward", "train/mean_response_length", "train/frac_truncated")
    draw(results / "collapses", list(runs.values()), collapses, "A run can collapse to long and to short")
    draw_difficulty(results / "difficulty", difficulty)
    (results / "README.md").write_text(page(runs, difficulty))


def collect(source: Path, results: Path) -> None:
    """Copy what is drawn from the runs and evaluations to CSV files."""
    for needed in (*RUNS, *STAGES):
        if not (source / needed).is_dir():
            raise ValueError(f"{source / needed}: no such folder; the page's commands make it:\n{COMMANDS}")
    runs, complaints = load_runs([source / name for name in RUNS])
    if complaints:
        raise ValueError("; ".join(complaints))
    rows = [
        (stage, decoding, level, values["problems"], values["reward"], values["std_error"])
        for stage in STAGES
        for decoding, figures in read_figures(source / stage).items()
        for level, values in {
            "all": {**figures, "std_error": figures["reward_std_error"]},
            **figures["by_level"],
        }.items()
    ]
    results.mkdir(parents=True, exist_ok=True)
    kept = [replace(run, curves={name: run.curves[name] for name in KEPT if name in run.curves}) for run in runs]
    write_csv(kept, results / "metrics.csv")
    with (results / "difficulty.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def read_figures(folder: Path) -> dict[str, dict]:
    """What evaluate.py wrote: the figures of each way of decoding."""
    return next(iter(json.loads((folder / "figures.json").read_text())["sets"].values()))


def draw(path: Path, runs: list[Run], metrics: tuple[str, ...], title: str) -> None:
    figure, complaints = draw_figure({"": runs}, metrics, title=title)
    if complaints:
        raise ValueError("; ".join(complaints))
    save_figure(figure, path)


def draw_difficulty(path: Path, rows: list[dict[str, str]]) -> None:
    """Reward by number of terms, before and after, for both ways of decoding."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2))
        axes = figure.subplots()
        for stage, dashes in zip(STAGES, (":", "-"), strict=True):
            for decoding, colour, marker in zip(ROUNDS, COLOURS[1:], MARKERS, strict=False):
                chosen = [row for row in rows if (row["stage"], row["decoding"]) == (stage, decoding)]
                chosen = sorted((row for row in chosen if row["level"] != "all"), key=lambda row: row["level"])
                x = [row["level"] for row in chosen]
                y, error = ([float(row[name]) for row in chosen] for name in ("reward", "std_error"))
                look = {"linestyle": dashes, "color": colour, "marker": marker, "capsize": 2, "markersize": 4}
                axes.errorbar(x, y, error, label=f"{STAGES[stage]}, {decoding}".replace("`", ""), **look)
        axes.set_ylim(0, 1.03)
        axes.set_title("reward on held-out problems", loc="left", fontsize=9.5, fontweight="bold")
        figure.legend(loc="outside right upper", frameon=False)
        save_figure(figure, path)


def page(runs: dict[str, Run], difficulty: list[dict[str, str]]) -> str:
    """README.md, with its numbers from the CSV files."""
    usual = runs[USUAL].curves

    def between(curves: dict, metric: str, digits: int) -> str:
        first, last = curves[metric][min(curves[metric])].value, curves[metric][max(curves[metric])].value
        return f"{first:.{digits}f} to {last:.{digits}f}"

    parts = [
        "# The tiny world of the ablations",
        "Sums of three to six numbers up to 9, such as `3+8+9=?`. A model of 0.6 M parameters has seen responses "
        "that write out every step, only the totals, or none, and responses that ramble; some of them are wrong and "
        "some malformed ([`utils/chains.py`](../../utils/chains.py)). So a policy can trade length, accuracy and "
        "format against each other. This page shows what a run in this world can show at all. The world, the "
        "configs and the claims were fixed before any question was asked of them. Two things were looked at first: the "
        "reward of two learning rates, of which 1e-4 climbed steadily and 3e-4 did not, and where the prompts start.",
        "## Length moves",
        "![reward, format reward and mean response length of the usual run](lengths.png)",
        f"In {runs[USUAL].last_step} steps of the on-policy config that the questions share, reward on held-out sums "
        f"goes from {between(usual, 'eval/reward', 2)}, format reward from {between(usual, 'eval/format_reward', 2)} "
        f"and the mean length of the held-out responses from {between(usual, 'eval/mean_response_length', 1)} tokens "
        "of at most 96.",
        "## A run can collapse to long and to short",
        "![right answers, mean response length and share of truncated responses of three runs](collapses.png)",
        "`long` has a rate that is too high, and the collapse guard ends it. `short` loses a tenth of a reward per "
        "token, so that an answer costs more than it earns.",
        *(
            f"With `{override}` (`{name}`) the mean response goes from "
            f"{between(runs[name].curves, 'train/mean_response_length', 1)} tokens, and the share of right answers "
            f"from {between(runs[name].curves, 'eval/answer_reward', 2)}, in {runs[name].last_step} steps."
            for name, override in COLLAPSES.items()
        ),
        "## Difficulty changes the pass rate",
        "![reward by number of terms, before and after the usual run](difficulty.png)",
        table(difficulty),
        "Reward by number of terms ± standard error over problems, before and after the usual run, with greedy "
        "decoding and of 8 sampled responses per problem.",
        "## Made by",
        f"```bash\n{COMMANDS}\n```",
        "With `--redraw` the last command draws the pictures from `metrics.csv` and `difficulty.csv`.",
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, str]]) -> str:
    """A row per level, a column per stage and way of decoding."""
    columns = [(stage, decoding) for stage in STAGES for decoding in ROUNDS]
    cells = {(row["stage"], row["decoding"], row["level"]): row for row in rows}
    lines = [
        " | ".join(["", *(f"{STAGES[stage]}, {decoding}" for stage, decoding in columns)]),
        "---|" * len(columns) + "---",
    ]
    for level in dict.fromkeys(row["level"] for row in rows):
        figures = (cells[stage, decoding, level] for stage, decoding in columns)
        lines.append(" | ".join([level, *(f"{float(f['reward']):.3f} ± {float(f['std_error']):.3f}" for f in figures)]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/world", help="folder of the runs and evaluations (runs/world)")
    parser.add_argument("--results", default="results/world", help="folder to write (results/world)")
    parser.add_argument("--redraw", action="store_true", help="draw from the CSV files in --results")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), show))
