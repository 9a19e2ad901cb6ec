"""How a clip becomes the model's frames, in numbers and in plain words: its speed, what is cut off, and its scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refalign_training.data.recipe import MODEL_FPS, Recipe


_EVEN = 0.02  # a speed or a scale this near to 1 is 1


@dataclass(frozen=True)
class Played:
    """What was done to a clip."""

    path: Path
    size: tuple[int, int]
    """Width and height as players show it, in pixels; of the crop, if there is one."""
    fps: float
    """The file's frames per second, on average."""
    seconds: float
    """The clip's duration."""
    speed: float
    """1 is real time, 2 is twice as fast."""
    slowdown: float
    """How many times more slowly it is played than it should be, as it is too short; else 1."""
    cut_off: float
    """The share of the picture that is cut off at its sides."""
    scale: float
    """Above 1 it is enlarged, below 1 it is made smaller."""
    notes: tuple[str, ...] = ()
    """What else there is to know of the file, each as the rest of a sentence "It ..."."""


def fit_of(size: tuple[int, int], recipe: Recipe) -> tuple[float, float]:
    """What is cut off of a picture of this size that has to cover the recipe's, as a share, and its scale."""
    width, height = size
    scale = max(recipe.width / width, recipe.height / height)
    return 1 - recipe.width * recipe.height / (width * height * scale**2), scale


def describe(played: Played) -> str:
    """One clip in plain words."""
    width, height = played.size
    words = [
        f"{played.path.name}: {width}x{height}, {played.fps:.4g} frames a second, {played.seconds:.1f} s.",
        f"Played {speed_in_words(played.speed)}{', as it is too short' if played.slowdown > 1 + _EVEN else ''};",
        f"{played.cut_off:.0%} of the picture is cut off; {_scale_in_words(played.scale)}.",
    ]
    words += [f"It {note}." for note in played.notes]
    return " ".join(words)


def speed_in_words(speed: float) -> str:
    """Such as "in real time"."""
    if abs(speed - 1) <= _EVEN:
        return "in real time"
    return f"{speed:.2g} times as fast as it was filmed" + (" (slow motion)" if speed < 1 else "")


def _scale_in_words(scale: float) -> str:
    if abs(scale - 1) <= _EVEN:
        return "it keeps its size"
    return f"it is enlarged {scale:.2g} times" if scale > 1 else f"it is made {1 / scale:.2g} times smaller"


class Summary:
    """How the clips of a dataset are played, cropped and enlarged. Memory does not grow with it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._speeds: dict[str, int] = {}
        self._slowed, self._slowest, self._needed = 0, (float("inf"), ""), 0.0
        self._cropped, self._most_cropped = 0, (0.0, "")
        self._enlarged, self._most_enlarged = 0, (0.0, "")
        self._notes: dict[str, int] = {}

    def add(self, name: str, played: Played) -> None:
        """Counts a clip; `name` says which one it is."""
        if played.slowdown > 1 + _EVEN:
            self._slowed += 1
            self._slowest = min(self._slowest, (played.speed, name))
            self._needed = (self._recipe.num_frames - 1) / MODEL_FPS * played.speed * played.slowdown
        else:
            words = speed_in_words(played.speed)
            self._speeds[words] = self._speeds.get(words, 0) + 1
        if played.cut_off >= 0.01:
            self._cropped += 1
            self._most_cropped = max(self._most_cropped, (played.cut_off, name))
        if played.scale > 1 + _EVEN:
            self._enlarged += 1
            self._most_enlarged = max(self._most_enlarged, (played.scale, name))
        for note in played.notes:
            self._notes[note] = self._notes.get(note, 0) + 1

    def lines(self) -> Sequence[str]:
        """What is told; nothing if there was no clip."""
        lines = [f"played {words}: {count}" for words, count in self._speeds.items()]
        if self._slowed:
            speed, name = self._slowest
            lines.append(
                f"played more slowly, as they are shorter than the {self._needed:.1f} s of "
                f"{self._recipe.num_frames} frames: {self._slowed} (slowest: {speed:.2g} times as fast as it was "
                f"filmed, {name})"
            )
        if not lines:
            return []
        lines += [
            f"cropped to the size: {self._cropped}{_most('{:.0%} of the picture', self._most_cropped)}",
            f"enlarged to the size: {self._enlarged}{_most('{:.2g} times', self._most_enlarged)}",
        ]
        lines += [f"{note}: {count}" for note, count in self._notes.items()]
        recipe = self._recipe
        head = (
            f"how clips become {recipe.num_frames} frames of {recipe.width}x{recipe.height}, which last "
            f"{recipe.num_frames / MODEL_FPS:.1f} s at the model's {MODEL_FPS} frames a second:"
        )
        return [head, *(f"  {line}" for line in lines)]


def _most(words: str, most: tuple[float, str]) -> str:
    value, name = most
    return f" (most: {words.format(value)}, {name})" if name else ""
