"""Cross pairs: which subject of which clip another clip shows too, joined to those clips' records on disk.

The clips of a pair may be in any of the annotation files, in any order, and there are millions: a temporary SQLite
database holds the pairs and the views they ask for, and memory stays flat.
"""

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from refalign_training.data import fields
from refalign_training.data.fields import Unusable
from refalign_training.data.recipe import SelectionRule
from refalign_training.data.records import Record, first_character, read_members
from refalign_training.data.sample import Fault, Place, View


_TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA cache_size = -32000;
    CREATE TABLE clip (number INTEGER PRIMARY KEY, id TEXT UNIQUE);
    CREATE TABLE pair (clip INTEGER, subject TEXT, other INTEGER, other_subject TEXT, similarity REAL, file INTEGER,
        row INTEGER, PRIMARY KEY (clip, subject, other, other_subject)) WITHOUT ROWID;
    CREATE TABLE view (clip INTEGER, subject TEXT, view TEXT, PRIMARY KEY (clip, subject)) WITHOUT ROWID;
"""
_VIEWS = """
    SELECT view.view FROM clip JOIN pair ON pair.clip = clip.number
    JOIN view ON view.clip = pair.other AND view.subject = pair.other_subject
    WHERE clip.id = ? AND pair.subject = ? AND view.view IS NOT NULL
    ORDER BY pair.similarity DESC, pair.other, pair.other_subject LIMIT ?
"""
_MISSING = """
    SELECT clip.id, pair.subject, pair.file, min(pair.row) FROM pair JOIN clip ON pair.clip = clip.number
    WHERE NOT EXISTS (SELECT 1 FROM view WHERE view.clip = pair.clip AND view.subject = pair.subject)
    GROUP BY pair.clip, pair.subject
"""


def check_pair_files(files: Sequence[Path]) -> None:
    """Raises ValueError if a file is missing, or holds an object instead of a list, as `cluster_videos.json` does."""
    for path in files:
        if not path.is_file():
            raise ValueError(f"The file of cross pairs {path} does not exist.")
        if first_character(path) == "{":
            raise ValueError(
                f"{path} is not a list of cross pairs. `cluster_videos.json` only says which clips may be alike; pass "
                "the other files of Jsons/cross_video_pairs, each a list of pairs with `cur_id` and `aft_id`."
            )


class CrossPairs(AbstractContextManager):
    """
    The pairs of some files, as [`check_pair_files`] wants them, and the views of their subjects: `read`, then `keep`
    what `wanted` names, then `views`. The rule says how similar two images may be, and how many views are given.
    """

    def __init__(self, files: Sequence[Path], rule: SelectionRule) -> None:
        self._files, self._rule = files, rule
        self._folder = tempfile.TemporaryDirectory(prefix="refalign-cross-pairs-")
        # a generator that reads a dataset may be started in one thread and go on in another
        self._database = sqlite3.connect(Path(self._folder.name) / "pairs", check_same_thread=False)
        self._database.executescript(_TABLES)

    def __exit__(self, *_: Any) -> None:
        self._database.close()
        self._folder.cleanup()

    def read(self) -> Iterator[Fault]:
        """Takes in all pairs; yields what is wrong with them."""
        for file, path in enumerate(self._files):
            for record in read_members(path, "[]"):
                place = Place(str(path), record.row)
                with place.losing("nothing"):
                    self._add(record, file)
                yield from place.faults

    def _add(self, record: Record, file: int) -> None:
        pair = record.checked()
        cur_id = fields.required(pair, "cur_id", fields.text)
        aft_id = fields.required(pair, "aft_id", fields.text)
        cur_subject = fields.required(pair, "cur_class_id", _subject)
        aft_subject = fields.required(pair, "aft_class_id", _subject)
        similarity = fields.required(pair, "image_similarity", fields.number)
        ceiling = self._rule.max_image_similarity
        if cur_id == aft_id or (ceiling is not None and similarity > ceiling):
            return
        cur = self._number(cur_id), cur_subject
        aft = self._number(aft_id), aft_subject
        for ends in ((*cur, *aft), (*aft, *cur)):
            values = (*ends, similarity, file, record.row)
            self._database.execute("INSERT OR IGNORE INTO pair VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _number(self, sample_id: str) -> int:
        self._database.execute("INSERT OR IGNORE INTO clip (id) VALUES (?)", (sample_id,))
        return self._database.execute("SELECT number FROM clip WHERE id = ?", (sample_id,)).fetchone()[0]

    def wanted(self, sample_id: str) -> set[str]:
        """The subjects of a sample that are in a pair."""
        query = "SELECT DISTINCT subject FROM clip JOIN pair ON pair.clip = clip.number WHERE clip.id = ?"
        return set(itertools.chain.from_iterable(self._database.execute(query, (sample_id,))))

    def keep(self, sample_id: str, subject: str, view: View | None) -> None:
        """A wanted subject's view; `None` if it is there and cannot be used."""
        document = view and json.dumps([str(view.path), view.frame, view.crop, view.box, view.mask])
        query = "INSERT OR IGNORE INTO view SELECT number, ?, ? FROM clip WHERE id = ?"
        self._database.execute(query, (subject, document, sample_id))

    def missing(self) -> Iterator[Fault]:
        """The ends of pairs that were wanted and are not there, each once."""
        for sample_id, subject, file, row in self._database.execute(_MISSING):
            error = Unusable("cross pair", f"subject {subject!r} of {sample_id} is not in the annotations")
            yield Place(str(self._files[file]), row, sample_id).fault(error, lost="nothing")

    def views(self, sample_id: str, subject: str) -> tuple[View, ...]:
        """The subject in other clips, the most similar one first."""
        views = []
        for (document,) in self._database.execute(_VIEWS, (sample_id, subject, self._rule.max_cross_views)):
            path, frame, crop, box, mask = json.loads(document)
            views.append(View(Path(path), frame, tuple(crop), tuple(box), mask=mask))
        return tuple(views)


def _subject(value: Any, name: str) -> str:
    """A mask's id, which is a text, though some write it as a number."""
    return fields.text(value, name) if isinstance(value, str) else str(fields.integer(value, name))
