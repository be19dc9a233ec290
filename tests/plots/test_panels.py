"""What a reader sees of a figure: nothing is covered, a spike stays a spike, noise does not look like a difference."""

from __future__ import annotations

import itertools

import pytest
from plot_cases import (
    REFERENCE,
    boxes_of,
    line,
    names_in_legend,
    needs_reference,
    panel,
    run_of,
)

from utils.plots.figures import draw_figure
from utils.plots.history import load_runs

NOISE = [(-1) ** i * ((7 * i) % 5) / 4 for i in range(100)]  # between -1 and 1, without a trend


@pytest.mark.parametrize("n_metrics", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("name", ["x", "a_setting_with_a_name_that_is_far_too_long_for_a_place_in_the_grid_of_panels"])
@pytest.mark.parametrize("n_settings", [2, 30])
def test_the_legend_covers_nothing_and_is_whole(n_metrics: int, name: str, n_settings: int) -> None:
    metrics = [f"train_m{i}" for i in range(n_metrics)]
    runs = [run_of(f"{i}_{name}", **{m: [float(i), i + 1.0] for m in metrics}) for i in range(n_settings)]
    figure, _ = draw_figure({"ours": runs}, title="A question that is long enough to need several lines? " * 3)
    legend, others = boxes_of(figure)
    assert not any(legend.overlaps(box) for box in others)
    for box in (legend, *others):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1 + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(others[:n_metrics], 2))


@needs_reference
@pytest.mark.parametrize("name", ["lr_sweep", "length_normalization", "std_dev_normalization"])
def test_nothing_is_drawn_over_published_curves(name: str) -> None:
    runs, _ = load_runs([REFERENCE / f"{name}.csv"])
    figure, _ = draw_figure({"published": runs})
    legend, others = boxes_of(figure)
    assert not any(legend.overlaps(box) for box in others)
    assert all(not axes.texts for axes in figure.axes)
    assert len(names_in_legend(figure)) == len({run.name for run in runs})


def test_the_legend_is_in_the_order_of_the_ends_in_the_first_panel() -> None:
    runs = [
        run_of("falls", eval_reward=[0.9, 0.1], train_entropy=[1.0, 9.0]),
        run_of("rises", eval_reward=[0.1, 0.9], train_entropy=[1.0, 2.0]),
        run_of("ends_early", eval_reward=[0.5], train_entropy=[1.0, 3.0]),
        run_of("low_entropy", train_entropy=[1.0, 0.0]),
        run_of("high_entropy", train_entropy=[1.0, 5.0]),
    ]
    figure, _ = draw_figure({"ours": runs})
    assert names_in_legend(figure) == ["rises", "ends_early", "falls", "high_entropy", "low_entropy"]


def test_a_spike_stays_a_spike_and_the_thick_line_is_a_median() -> None:
    values = [0.5] * 40
    values[20] = 9.0
    figure, _ = draw_figure({"ours": [run_of("a", train_grad_norm=values)]})
    assert line(figure, "train/grad_norm", "a")[1] == [0.5] * 40
    faint, thick = figure.axes[0].get_lines()
    assert list(faint.get_ydata()) == values
    assert faint.get_alpha() < 1 and faint.get_linewidth() < thick.get_linewidth()
    assert figure.axes[0].get_ylim()[1] > 9
    short, _ = draw_figure({"ours": [run_of("a", train_grad_norm=values[:39])]})
    assert line(short, "train/grad_norm", "a")[1] == values[:39]


def test_scales() -> None:
    """Rewards begin at 0 and share a scale; a small difference stays small; decades are for medians, not for spikes."""
    norms = [1.0] * 50
    norms[25] = 0.001
    curves = {"eval_reward": [0.8, 0.9], "train_reward": [0.1, 0.4], "train_mean_response_length": [20.0, 20.5]}
    figure, _ = draw_figure({"ours": [run_of("a", **curves, train_grad_norm=norms)]})
    assert panel(figure, "eval/reward").get_ylim() == panel(figure, "train/reward").get_ylim() == (0, 0.9 * 1.05)
    low, high = panel(figure, "train/mean_response_length").get_ylim()
    assert high - low == pytest.approx(0.2 * 20.25)
    assert (low + high) / 2 == pytest.approx(20.25)
    assert panel(figure, "train/grad_norm").get_yscale() == "linear"
    figure, _ = draw_figure({"ours": [run_of("a", train_grad_norm=[1.0] * 25 + [0.01] * 25)]})
    assert figure.axes[0].get_yscale() == "log"


def test_curves_that_differ_by_less_than_their_noise_do_not_fill_the_panel() -> None:
    """Two curves, 0.2 apart, of noise 20; then 60 apart."""

    def filled(gap: float) -> float:
        runs = [run_of(name, train_m=[100 + shift + 10 * v for v in NOISE]) for name, shift in (("a", 0), ("b", gap))]
        figure, _ = draw_figure({"ours": runs}, ["train/m"])
        low, high = figure.axes[0].get_ylim()
        values = [v for drawn in figure.axes[0].get_lines() for v in drawn.get_ydata()]
        assert low <= min(values) and max(values) <= high
        return (max(values) - min(values)) / (high - low)

    assert filled(0.2) < 0.5
    assert filled(60) > 0.8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, -2.0, 1e-12])
def test_a_constant_has_a_scale(value: float) -> None:
    figure, _ = draw_figure({"ours": [run_of("a", train_m=[value] * 3)]}, ["train/m"])
    low, high = figure.axes[0].get_ylim()
    assert low <= value < high


def test_seeds_are_noise_too() -> None:
    runs = [run_of("a", train_m=[100 + shift + v for v in (0.0, 0.1, 0.0)]) for shift in (0, 20)]
    for seed, run in enumerate(runs):
        run.seed = seed
    figure, _ = draw_figure({"ours": runs}, ["train/m"])
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(3 * 20)
