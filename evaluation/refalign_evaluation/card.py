"""`refalign-eval card`: a run's results in the card of its model, and in the file from which the Hub reads them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional


if TYPE_CHECKING:
    from refalign_evaluation.results import Measured, Results


CARD = "README.md"
INDEX = "model-index"
ENTRIES = ".eval_results/opens2v-eval.yaml"
DATASET = "BestWishYsh/OpenS2V-Eval"
URL = f"https://huggingface.co/datasets/{DATASET}"
TASK = "reference-to-video"
FRONT = re.compile(r"\A(\ufeff?---[ \t]*\r?\n)(.*?)(?=^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)
# A key with the lines that belong to it: indented ones, and those of a list
BLOCK = re.compile(rf"^{INDEX}[ \t]*:.*\n(?:(?:[ \t]*\r?\n)*(?:[ \t]+\S|-).*\n)*", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """Write a run's results into its model's card and .eval_results, with the source of each figure."""

    run: Positional[Path]
    """The folder of a run with raw scores of all metrics."""
    model: Path
    """The folder of the model, or LoRA, that made the run's videos; it has a README.md."""


@dataclass(frozen=True)
class Figure:
    """A figure of the card."""

    key: str
    """The leaderboard's."""
    title: str
    value: float
    """In percent."""
    date: str
    source: dict[str, Any]
    """What measured it, and of how many videos."""


def run(command: Card) -> int:
    """
    Writes both files.

    Raises:
        ValueError: if the run has no total, or the folder no card to write to.
    """
    from refalign.files import new_file
    from refalign_evaluation.results import read_results
    from refalign_evaluation.run_folder import read_run
    from refalign_evaluation.total import check_total

    read_run(command.run)
    results = read_results([command.run])
    check_total(results)
    card, entries = command.model / CARD, command.model / ENTRIES
    texts = {entries: new_entries(entries, results), card: new_card(card, results)}
    for file, text in texts.items():
        with new_file(file, overwrite=True) as partial:
            partial.write_text(text, "utf-8", newline="")
        print(f"The results are in {file}")
    return 0


# -- Figures and their sources ----------------------------------------------------------------------------------------


def figures(results: "Results") -> list[Figure]:
    """The total and the scores of a run that has them all."""
    from refalign_evaluation.totals import TOTAL_KEY

    found = []
    for name, measured in results.measured.items():
        assert measured.score is not None
        source = _source(measured, (results.settings or {}).get(name))
        title, key = measured.metric.title, measured.metric.upload_key
        found.append(Figure(key, title, round(100 * measured.score, 2), measured.date, source))
    assert results.total is not None and results.run is not None
    made = {"videos": public(results.run.settings), "versions": dict(results.run.versions)}
    newest = max(figure.date for figure in found)
    total = Figure(TOTAL_KEY, "TotalScore v1.1", round(100 * results.total, 2), newest, made)
    return [total, *found]


def _source(measured: "Measured", settings: Mapping[str, Any] | None) -> dict[str, Any]:
    files = ", ".join(file.name for file in measured.files)
    source: dict[str, Any] = {"read_from": f"{files}, as the official tools write it"}
    if settings is not None:
        source = {"measured_by": "refalign-eval score", "settings": public(settings)}
    source["counted_videos"] = f"{measured.counted} of {measured.asked}"
    if measured.lacks_files:
        source["without"] = list(measured.lacks_files)
    return source


def public(value: Any) -> Any:
    """A setting as others may read it: of paths of this machine only the last name."""
    if isinstance(value, Mapping):
        return {str(key): public(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(public, value))
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _dataset_name(results: "Results") -> str:
    """What the figures are of, with how much of it."""
    count = len(results.samples)
    part = f", {count} of its {count + results.left_out} samples" if results.left_out else ""
    return f"OpenS2V-Eval ({results.split} domain{part})"


# -- The files --------------------------------------------------------------------------------------------------------


def new_card(card: Path, results: "Results") -> str:
    """
    The text of a card with the results in its front matter, where they take the place of earlier ones of this split.
    All else stays as it is.

    Raises:
        ValueError: if there is no card, or it has no front matter that can be changed.
    """
    import yaml

    if not card.is_file():
        raise ValueError(f"{card.parent} has no {CARD} to write results to. `refalign export` writes one.")
    try:
        text = card.read_bytes().decode("utf-8")
        front = FRONT.match(text)
        before = yaml.safe_load(front[2]) if front else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The front matter of {card} is not YAML in UTF-8 ({_one_line(error)}). Mend it.") from error
    if front is None or not isinstance(before, dict):
        raise ValueError(
            f"{card} has no front matter, YAML between two lines of ---, as cards begin with. Add it with license and "
            "base_model."
        )
    index = _new_index(card, before.get(INDEX), results)
    block = yaml.safe_dump({INDEX: index}, sort_keys=False, allow_unicode=True, width=110)
    if "\r\n" in front[1]:
        block = block.replace("\n", "\r\n")
    found = BLOCK.search(front[2])
    changed = front[2] + block
    if found is not None:
        changed = front[2][: found.start()] + block + front[2][found.end() :]
    if (found is None) == (INDEX in before) or not _is_right(changed, {**before, INDEX: index}):
        raise ValueError(f"The {INDEX} of {card} is written in a way that cannot be changed. Remove it.")
    return front[1] + changed + text[front.end() :]


def _is_right(front: str, wanted: Mapping[str, Any]) -> bool:
    import yaml

    try:
        return yaml.safe_load(front) == wanted
    except yaml.YAMLError:
        return False


def _new_index(card: Path, index: Any, results: "Results") -> list[dict[str, Any]]:
    """A card's `model-index` with the results, beside those of other benchmarks and splits."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index = index or []
    try:
        first = index[0] if index else {"name": results.run and results.run.model, "results": []}
        name = first["name"]
        others = [result for result in first["results"] if not _is_of(result, results.split)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"The {INDEX} of {card} is not a list of models with results. Remove it.") from error
    found = []
    for figure in figures(results):
        found.append(
            EvalResult(
                task_type=TASK,
                dataset_type=DATASET,
                dataset_name=_dataset_name(results),
                dataset_config=results.split,
                metric_type=figure.key,
                metric_value=figure.value,
                metric_name=f"{figure.title} (%)",
                metric_args={**figure.source, "date": figure.date},
                source_name="refalign-eval",
                source_url=URL,
            )
        )
    (ours,) = eval_results_to_model_index(name, found)
    return [{"name": name, "results": [*others, *ours["results"]]}, *index[1:]]


def _is_of(result: Mapping[str, Any], split: str) -> bool:
    """Whether it is an earlier result of ours of the split."""
    dataset = result["dataset"]
    return dataset.get("type") == DATASET and dataset.get("config") == split


def new_entries(file: Path, results: "Results") -> str:
    """
    The text of a file of `.eval_results` with the results, beside those of other splits. Its format:
    https://huggingface.co/docs/hub/eval-results.

    Raises:
        ValueError: if the file is there and is not a list of results.
    """
    import yaml

    found = []
    for figure in figures(results):
        entry = {
            "dataset": {"id": DATASET, "task_id": f"{results.split}_{figure.key}"},
            "value": figure.value,
            "date": figure.date,
            "source": {"url": URL, "name": "refalign-eval"},
            "notes": "; ".join([f"percent, {_dataset_name(results)}", *_told(figure.source)]),
        }
        found.append(entry)
    entries = [*_others(file, results.split), *found]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=110)


def _others(file: Path, split: str) -> list[dict[str, Any]]:
    """The entries of a file that are not of the split."""
    import yaml

    if not file.exists():
        return []
    try:
        entries = yaml.safe_load(file.read_text("utf-8")) or []
        return [entry for entry in entries if not entry["dataset"]["task_id"].startswith(f"{split}_")]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a list of the Hub's results ({_one_line(error)}). Remove it.") from error


def _told(source: Mapping[str, Any]) -> list[str]:
    """A source in words."""
    lines = []
    for name, value in source.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        lines.append(f"{name.replace('_', ' ')}: {value}")
    return lines


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
