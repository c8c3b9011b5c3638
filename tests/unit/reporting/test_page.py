"""The report: complete, self-contained, safe to open, and possible from whatever part of a run exists."""

import csv
import json
import re
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.harness.commands import run_script
from trainer.errors import UserError
from trainer.files import read_json_lines
from trainer.reporting.figures import (
    MAX_FIGURE_INCHES,
    MAX_SHOWN_TARGETS,
    confusion_matrix_figure,
    figure_label,
    residuals_figure,
    select_values,
    smooth,
)
from trainer.reporting.page import build_report, find_confident_errors, read_residuals

NEWS = ["World", "Sports", "Business", "Sci/Tech"]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}{% raw %}",
    "$x_{",
    "$\\frac{$",
    "_private",
    "🦜 שלום \u202e",
    "nul\x00bell\x07",
    "' onmouseover='alert(1)' style='background:url(http://example.com)",
    "long " * 60,
]
FIGURES = {f"figures/{name}.png" for name in ("loss", "accuracy", "learning_rate", "throughput")}


class Page(HTMLParser):
    """Collects what a browser would act on, and the text it would show."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(folder: Path, labels: Sequence[str] = NEWS, text: str = "A text.", name: str = "demo") -> Path:
    """Writes a finished run of 12 steps in 3 epochs with two scored splits: 4 examples a class, one of them wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"run": {"name": name, "seed": 42}, "data": {"label_names": list(labels)}, "peft": {"r": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    start = {"time": "2026-01-12T10:31:07", "command": f"run.py --run.name '{name}'", "world_size": 1, "device": "cpu"}
    start |= {"precision": "no", "versions": {"torch": "2.13.0"}, "platform": "Linux", "resumed_from": None}
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    lines = []
    for step in range(1, 13):
        rates = {"speed/examples_per_second": 90.0, "speed/tokens_per_second": 4000.0, "speed/padding_fraction": 0.0}
        record = {"step": step, "epoch": step / 4, "train/loss": 2 / step, "train/learning_rate": 1e-3 / step}
        lines.append(json.dumps(record | rates))
        if step % 4 == 0:
            scores = {"validation/accuracy": 0.7 + step / 100, "validation/f1_macro": 0.7, "validation/loss": 0.5}
            lines.append(json.dumps({"step": step, "epoch": step / 4} | scores))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for split in ("validation", "test"):
        write_split(folder / "evaluation" / split, labels, text)
    write_summary(folder / "summary.json", labels)
    return folder


def write_split(folder: Path, labels: Sequence[str], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    num_labels = len(labels)
    matrix = np.eye(num_labels, dtype=int) * 3 + np.roll(np.eye(num_labels, dtype=int), 1, axis=1)
    scores = {"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4}
    metrics: dict[str, Any] = {"accuracy": 0.75, "loss": 0.6, "num_examples": 4 * num_labels}
    metrics |= {f"{name}_macro": 0.75 for name in scores if name != "support"}
    metrics["per_class"] = dict.fromkeys(labels, scores)
    metrics["class_shares"] = {label: {"predicted": 0.4321, "train": 0.1234} for label in labels}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with (folder / "confusion_matrix.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [[label, *row] for label, row in zip(labels, matrix.tolist(), strict=True)]
        csv.writer(file).writerows([["true \\ predicted", *labels], *rows])
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["id", "label", "prediction", "confidence", *(f"probability:{label}" for label in labels), "text"]
        )
        for place in range(4 * num_labels):
            true = place % num_labels
            predicted = (true + (place < num_labels)) % num_labels
            confidence = 0.5 + place / (8 * num_labels)
            writer.writerow([place, labels[true], labels[predicted], confidence, *[0] * num_labels, f"{place}: {text}"])


def write_summary(path: Path, labels: Sequence[str]) -> None:
    split = {"num_examples": 40, "label_counts": dict.fromkeys(labels, 10), "num_duplicates": 0}
    summary: dict[str, Any] = {"status": "finished", "recipe": "quickstart", "steps": 12, "epochs": 3.0, "best_step": 8}
    summary |= {"world_size": 1, "trainable_parameters": 1000, "total_parameters": 100_000, "adapter_bytes": 4096}
    summary |= {"train_seconds": 3723.4, "examples_per_second": 90.0, "tokens_per_second": 4000.0}
    summary |= {"padding_fraction": 0.02, "peak_memory_bytes": 2**30, "precision": "no", "resumed_from": []}
    summary["parameters"] = [{"module": "head", "trainable": 1000, "total": 1000}]
    summary["data"] = {"train": split, "test": split | {"num_in_train": 3}}
    path.write_text(json.dumps(summary))


def read_page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_finished_run_gets_every_file_and_number(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_report(run) == run / "report.html"
    evaluations = {f"evaluation/{split}/confusion_matrix.png" for split in ("validation", "test")}
    pictures = {path.relative_to(run).as_posix() for path in run.rglob("*.png")}
    assert pictures == FIGURES | evaluations
    assert all((run / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert not list(run.rglob("*.tmp"))
    text = read_page(run).text
    numbers = (
        "75.00%",
        "1,000",
        "1.00% of 100,000",
        "43.2%",
        "12.3%",
        "4.0 KiB",
        "390.6 KiB",
        "1:02:03",
        "90.0",
        "2.00%",
        "torch 2.13.0",
    )
    for shown in numbers:
        assert shown in text


def test_hostile_content_is_shown_as_text(tmp_path: Path) -> None:
    everything = "\n".join(HOSTILE)
    run = write_run(tmp_path / "run", labels=HOSTILE, text=everything, name=everything)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_report(run)
    source = (run / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    for hostile in HOSTILE:
        visible = re.sub(r"[\x00\x07]", "\ufffd", hostile)
        assert page.text.count(visible) >= 15  # title, heading, tables, each error's labels and text, settings, command
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", source)
    assert_inert(page, source)


def assert_inert(page: Page, source: str) -> None:
    """Asserts that nothing in a page runs, and that nothing in it asks for anything from outside."""
    tags = "html head meta title link style body header section div figure figcaption h1 h2 h3 p span b bdi code img"
    assert {tag for tag, _ in page.tags} <= set(f"{tags} ol li table thead tbody tr th td".split())
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(key) or "data:").startswith("data:")
        assert re.fullmatch(r"(--share: [0-9.]+%)?", attributes.get("style") or "")
    styles = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags


@pytest.mark.parametrize(
    "missing",
    [
        ["summary.json"],
        ["environment.json", "config.yaml"],
        ["metrics.jsonl"],
        ["evaluation/test/metrics.json", "evaluation/validation/predictions.csv"],
    ],
    ids=" ".join,
)
def test_missing_files_are_fine(tmp_path: Path, missing: list[str]) -> None:
    run = write_run(tmp_path / "run")
    for path in missing:
        (run / path).unlink()
    build_report(run)
    assert ("unfinished" in read_page(run).text) == ("summary.json" in missing)
    assert (run / "figures/loss.png").exists() == ("metrics.jsonl" not in missing)


def test_an_unfinished_run_without_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "train/loss": 1.5}\n')
    build_report(run)
    assert {path.name for path in run.rglob("*.png")} == {"loss.png"}
    assert "last logged step 1" in read_page(run).text


def test_without_a_test_split_the_validation_errors_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in sorted((run / "evaluation/test").iterdir()):
        path.unlink()
    (run / "evaluation/test").rmdir()
    build_report(run)
    assert "most confident errors of the validation split" in read_page(run).text


def test_a_torn_last_line_of_the_metrics_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": NaN}\n{"step": 2, "a\xe2\x80\xa8b": 1}\n{"step": 3, "tr\xc3')
    records = read_json_lines(path)
    assert [record["step"] for record in records] == [1, 2]
    assert not len(select_values(records, "train/loss")[0])


def test_150_classes_fit_the_page(tmp_path: Path) -> None:
    labels = [f"a_rather_long_intent_name_{number:03}" for number in range(150)]
    run = write_run(tmp_path / "run", labels=labels)
    build_report(run)
    assert labels[149] in read_page(run).text
    figure = confusion_matrix_figure(np.eye(150, dtype=int), labels)
    assert max(figure.get_size_inches()) <= MAX_FIGURE_INCHES + 1
    assert not figure.axes[0].texts  # no counts where they could not be read


def test_cell_colors_show_the_share_of_the_true_class() -> None:
    figure = confusion_matrix_figure(np.array([[6, 2], [0, 0]]), NEWS[:2])
    shares = np.asarray(figure.axes[0].images[0].get_array())
    assert shares.tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_figure_labels_are_one_short_line_the_font_can_draw() -> None:
    assert figure_label("two\nlines") == "two lines"
    assert figure_label("\x00新\ud800") == "\ufffd" * 3
    assert figure_label("comp.sys.ibm.pc.hardware.one", max_length=11) == "comp.…e.one"
    assert len(figure_label("x" * 1000)) == 24


def test_errors_are_sorted_by_confidence(tmp_path: Path) -> None:
    confidences = np.random.default_rng(0).permutation(100) / 100
    with (tmp_path / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "prediction", "confidence", "text", "text_pair"])
        for place, confidence in enumerate(confidences):
            writer.writerow(
                [place, "a", "ab"[place % 2], confidence, "long " * 40_000 if place == 1 else "text", "pair"]
            )
    errors = find_confident_errors(tmp_path / "predictions.csv")
    expected = sorted(range(1, 100, 2), key=lambda place: -confidences[place])[:25]
    assert [int(row["id"]) for row in errors] == expected


def write_numbers(folder: Path, names: Sequence[str], true: Any, predicted: Any) -> None:
    """Turns a split into that of a regression; the numbers are [N, C]."""
    for name in ("confusion_matrix.csv", "metrics.json"):
        (folder / name).unlink()
    scores = {"mse": 1.25e-7, "mae": 0.25, "pearson": -0.5, "spearman": 0.75, "r2": -12.5}
    metrics = {**scores, "loss": 0.5, "num_examples": len(true), "per_class": dict.fromkeys(names, scores)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    pairs = list(zip(np.array(true).tolist(), np.array(predicted).tolist(), strict=True))
    with (folder / "residuals.csv").open("w", newline="") as file:
        rows = [[name, t, p] for ts, ps in pairs for name, t, p in zip(names, ts, ps, strict=True)]
        csv.writer(file).writerows([["target", "true", "predicted"], *rows])
    with (folder / "predictions.csv").open("w", newline="") as file:
        cells = [[json.dumps(row[0] if len(names) == 1 else row) for row in pair] for pair in pairs]
        rows = [[i, *pair, f"text {i}"] for i, pair in enumerate(cells)]
        csv.writer(file).writerows([["id", "label", "prediction", "text"], *rows])


@pytest.mark.parametrize("names", [["stars"], ["stars", HOSTILE[0]]])
def test_a_regression_has_scores_residuals_and_its_largest_errors(tmp_path: Path, names: list[str]) -> None:
    run = write_run(tmp_path / "run")
    size = 1000.0 ** np.arange(len(names))
    true = np.random.default_rng(0).normal(size=(40, len(names))) * size
    predicted = true.copy()
    predicted[7, -1] += 5 * size[-1]
    predicted[3, 0] -= 2 * size[0]
    for split in ("validation", "test"):
        write_numbers(run / "evaluation" / split, names, true, predicted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_report(run)
    assert all((run / f"evaluation/{split}/residuals.png").is_file() for split in ("validation", "test"))
    page = read_page(run)
    assert "The largest errors of the test split" in page.text and "Scores by target" in page.text
    assert "1.25e-07" in page.text and "-12.500" in page.text and "onfusion" not in page.text
    assert all(name in page.text for name in names) and "script" not in {tag for tag, _ in page.tags}
    assert page.text.index("text 7") < page.text.index("text 3"), "the error in standard deviations counts"


@pytest.mark.parametrize("damage", ["stars,1\n", "stars,1,x\n", "price,1,2\n"])
def test_damaged_residuals_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "residuals.csv"
    path.write_text("target,true,predicted\nstars,1,2\nstars,3,4\n")
    assert read_residuals(path)["stars"].tolist() == [[1, 2], [3, 4]]
    path.write_text(path.read_text() + damage)
    with pytest.raises(UserError, match="residuals"):
        read_residuals(path)


@pytest.mark.parametrize("count", [1, 3])
def test_equal_numbers_have_a_figure_too(count: int) -> None:
    constant = np.full((count, 1), 2.5)
    assert len(residuals_figure(constant, constant, ["x"]).axes) == 2
    assert len(residuals_figure(np.zeros((count, 20)), np.ones((count, 20)), ["x"] * 20).axes) == 2 * MAX_SHOWN_TARGETS


def test_full_texts_and_pairs_are_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text, pair = "word " * 3000, "the second\ntext"
    with (run / "evaluation/test/predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "prediction", "confidence", "text", "text_pair"])
        writer.writerow([7, "a", "b", 0.987, text, pair])
    build_report(run)
    shown = read_page(run).text
    assert text in shown
    assert pair in shown
    assert "98.7%" in shown


def test_smoothing_keeps_a_constant_and_a_short_series() -> None:
    assert np.allclose(smooth(np.full(200, 3.0)), 3.0)
    assert smooth(np.array([5.0, 1.0])).tolist() == [5.0, 1.0]
    values = np.linspace(10, 0, 400) ** 2
    assert np.isclose(smooth(values)[0], values[:11].mean())
    assert np.isclose(smooth(values)[200], values[190:211].mean())


def test_the_command_works_from_any_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = run_script("report.py", ["--run", "run"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/report.html\n", "")
    assert (run / "report.html").exists()


@pytest.mark.parametrize("kind", ["missing", "torn"])
def test_a_bad_folder_exits_with_one_line_and_code_2(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "torn":
        (folder / "config.yaml").write_text("run: [1,\nname: {")
    done = run_script("report.py", ["--run", folder], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"error: {re.escape(str(folder))}[^\n]+\n", done.stderr)
    assert not list(tmp_path.rglob("*.html"))
