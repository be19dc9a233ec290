"""The HTML page of rollouts: nothing a model wrote is obeyed, and a browser shows it as it should."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser_cases import CHROMIUM, opened
from rollout_cases import hostile_run, view  # noqa: F401, the fixture `run`

from utils.log.run_log import RunLog
from utils.records import Problem, Prompt, Reward, Rollout


class Elements(HTMLParser):
    """Elements with their attributes and own text, as a browser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.current = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.current = tag

    def handle_endtag(self, tag: str) -> None:
        self.current = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.current, []).append(data)


def test_page_holds_every_response_as_data_alone(run: Path, tmp_path: Path) -> None:
    done = view(run, "--html", tmp_path / "out" / "page.html")
    assert done.stdout.strip() == str(tmp_path / "out" / "page.html"), done.stderr
    page = (tmp_path / "out" / "page.html").read_text()
    elements = Elements(page)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 2
    assert tags.count("style") == 1
    assert "img" not in tags
    loading = {"src", "href", "onerror", "onload", "style"}
    assert not any(loading & set(attributes) for _, attributes in elements.found)
    assert "innerHTML" not in page

    data, script = elements.texts["script"]
    logged = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert json.loads(data) == {"rollouts": logged, "run": {"eval": {}, "train": {}}}

    (policy,) = [a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


@in_a_browser
def test_page_in_a_browser_obeys_nothing_a_model_wrote(run: Path, tmp_path: Path) -> None:
    view(run, "--html", tmp_path / "page.html")
    with opened((tmp_path / "page.html").as_uri(), tmp_path) as page:
        assert page.run("document.title") == f"Rollouts of {run}"
        assert page.run("document.querySelectorAll('script').length") == 2
        squares = "[...document.querySelectorAll('#map td button')].map(b => b.classList[0])"
        assert page.run(squares) == ["wrong"] * 4 + ["format"] * 2 + ["right"] * 2  # four problems, two evaluations
        responses = page.run("[...document.querySelectorAll('article pre')].map(p => p.textContent.slice(0, 26))")
        assert responses == ["eval response 0 of step 0 ", "eval response 0 of step 4 "]


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """Sixty problems evaluated at eight steps, and training groups of four; the last word of a response is its own."""
    with RunLog(tmp_path / "run", n_grpo_steps=8) as log:
        for step in range(8):
            rollouts = [
                Rollout(
                    Prompt(Problem(f"question {i}", "t"), f"Solve question {i}", (1,)),
                    "word " * 200 + f"end{i}of{step}", (1,), (0.0,), "stop",
                )
                for i in range(60)
            ]  # fmt: skip
            rewards = [Reward(1.0, float(i % 3 == 0), float(i % 3 == 0)) for i in range(60)]
            log.evaluation(step, {"reward": 0.12 + step / 100, "mean_response_length": 77.0})
            log.rollouts("eval", step, rollouts, rewards, n=60)
            if step:
                log.train_step(step, {"reward": 0.5, "mean_response_length": 88.0})
                groups = [dataclasses.replace(r, prompt=rollouts[i // 4].prompt) for i, r in enumerate(rollouts[:8])]
                log.rollouts("train", step, groups, rewards[:8], [0.5] * 8, n=8, group_size=4)
    return tmp_path / "run"


SCROLLS = """[window.scrollY, document.getElementById("map").scrollTop, document.getElementById("reader").scrollTop]"""


@in_a_browser
def test_page_opens_at_its_top_and_stays_where_it_is(long_run: Path, tmp_path: Path) -> None:
    view(long_run, "--html", tmp_path / "page.html")
    with opened((tmp_path / "page.html").as_uri(), tmp_path, width=1200, height=700) as page:
        assert page.run(SCROLLS) == [0, 0, 0]
        for seen in ("h1", "#split", "#text", "#map button", "#question"):
            box = page.run(f"JSON.parse(JSON.stringify(document.querySelector('{seen}').getBoundingClientRect()))")
            assert box["top"] >= 0 and box["bottom"] <= 700, seen
        assert page.run("document.documentElement.scrollHeight") == 700  # the panes scroll, not the page

        page.run("document.getElementById('map').scrollTop = 300; document.getElementById('reader').scrollTop = 200")
        page.run("document.getElementById('text').focus()")
        for typed in ("w", "o", "r", "d"):
            page.type(typed)
            assert page.run(SCROLLS) == [0, 300, 200]
        assert page.run("document.activeElement.id") == "text"

        page.run("document.querySelectorAll('#map tbody tr')[40].querySelectorAll('button')[5].click()")
        assert page.run("document.querySelector('#question pre').textContent") == "question 40"
        heading, question = (
            page.run(f"document.querySelector('{what}').getBoundingClientRect().{side}")
            for what, side in (("h2.chosen", "top"), ("#question", "bottom"))
        )
        assert question <= heading < 400  # the step that was clicked on is below the question, which stays in sight
        assert page.run("document.querySelector('#question').getBoundingClientRect().top") >= 0
        assert page.run("document.querySelector('h2.chosen').textContent") == "step 5"


@in_a_browser
def test_page_searches_and_filters(long_run: Path, tmp_path: Path) -> None:
    view(long_run, "--html", tmp_path / "page.html")
    squares = "[...document.querySelectorAll('#map td button')].filter(b => !b.classList.contains('hidden')).length"
    with opened((tmp_path / "page.html").as_uri(), tmp_path) as page:
        assert page.run(squares) == 480
        page.run("document.getElementById('text').focus()")
        page.type("end7of3")
        assert page.run(squares) == 1
        assert page.run("document.getElementById('count').textContent") == "1 of 480 responses"
        assert "passes the filters" in page.run("document.getElementById('reader').textContent")
        page.run("document.querySelector('#map td button:not(.hidden)').click()")
        assert page.run("[...document.querySelectorAll('h2')].map(h => h.textContent)") == ["step 3"]
        page.run("find('text').value = ''; find('kind').value = 'right'; find('kind').oninput()")
        assert page.run(squares) == 20 * 8
        rows = "[...document.querySelectorAll('#map thead tr')].map(r => [...r.children].map(c => c.textContent))"
        table = {row[0]: row[1:] for row in page.run(rows)}
        assert table["mean reward of the groups logged"] == ["0.33"] * 8
        assert table["mean reward of the run"] == [f"{0.12 + step / 100:.2f}" for step in range(8)]
        assert table["mean tokens of the run"] == ["77"] * 8


@in_a_browser
def test_page_shows_a_group_side_by_side(long_run: Path, tmp_path: Path) -> None:
    view(long_run, "--html", tmp_path / "page.html")
    with opened((tmp_path / "page.html").as_uri(), tmp_path) as page:
        page.run("find('split').value = 'train'; find('split').oninput()")
        page.run("find('kind').value = 'right'; find('kind').oninput()")
        first = page.run("[...document.querySelectorAll('#map tbody td:nth-child(2)')].map(cell => cell.textContent)")
        assert first == ["2/4", "1/4"]  # right are 0, 3 and 6
        assert page.run("document.querySelector('h2').textContent") == "step 1, 4 responses, mean reward 0.500"
        boxes = page.run(
            "[...document.querySelectorAll('article')].map(a => [a.offsetTop, a.classList.contains('faint')])"
        )
        assert boxes[0][0] == boxes[1][0]
        assert [faint for _, faint in boxes] == [False, True, True, False]  # the group stays whole
        facts = page.run("document.querySelector('article').textContent")
        assert "reward 1" in facts and "advantage 0.500" in facts
        assert page.run("[...document.querySelectorAll('#map thead tr')][2].children[1].textContent") == "0.50"
