"""What all options have in common: strict types, bounds, and errors that name the option, its value and the remedy."""

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass


Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
# Files have lists, and may write a list of one as the one
Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Many = BeforeValidator(lambda value: tuple(value) if isinstance(value, list | tuple) else (value,))

UNKNOWN = "is not an option."
REMEDIES = {
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text; put it in quotes",
    "literal_error": "{expected}",
    "tuple_type": "a list",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "dataclass_type": "a section with options of its own",
}


class InvalidOption(Exception):
    """
    An option that cannot be used. It is not a ValueError: pydantic and tyro would wrap it in their own words.

    Args:
        section (`type`): the class that has the option.
        name (`str`): the option's name in its section; empty for the section itself.
        problem (`str`): what is wrong and what to do, as the rest of a sentence.
    """

    def __init__(self, section: type, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}".lstrip())
        self.section, self.name, self.problem = section, name, problem


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True))
class Options:
    """
    A section of options. Docstrings beneath its fields are the help texts.

    Raises:
        InvalidOption: if an option is unknown, of another type, or out of its bounds.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _tell_in_one_line(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        try:
            return validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        name = ".".join(part for part in first["loc"] if isinstance(part, str))
        raise InvalidOption(cls, name, _problem(first))


def _problem(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return UNKNOWN
    if kind == "missing":
        return "lacks a value."
    if kind == "value_error":
        return f"is {error['input']!r:.80}: {context['error']}"
    remedy = REMEDIES[kind].format(**context) if kind in REMEDIES else error["msg"]
    return f"is {error['input']!r:.80}: it must be {remedy}."
