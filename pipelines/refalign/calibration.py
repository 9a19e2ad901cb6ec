"""How much the transformer's residual changes from step to step, for each guidance pass: the ratios that MagCache
(arXiv 2506.09045) skips by, measured once and kept in the model's folder."""

from refalign.files import fetch, read_json


RATIOS = "mag_cache.json"
PASSES = ("null", "reference", "full")


def read_ratios(model: str, base: str | None = None) -> dict[str, list[float]]:
    """
    The ratios of each guidance pass of a pipeline, a folder or Hub id, as `refalign calibrate` measured them.

    Raises:
        ValueError: if there are none, or they are not what they should be.
    """
    if base is not None:
        raise ValueError(
            f"--cache mag reads {RATIOS} of a pipeline's folder, and {model} is a native checkpoint. Make it a folder "
            "with `refalign convert`, and call `refalign calibrate --model FOLDER`."
        )
    file = fetch(model, [RATIOS]) / RATIOS
    if not file.is_file():
        raise ValueError(
            f"--cache mag needs {RATIOS} in {model}, which is not there. Call `refalign calibrate --model {model}` "
            "once, or take --cache first-block."
        )
    ratios = read_json(file).get("ratios")
    if not _are_ratios(ratios):
        raise ValueError(f"{file} does not hold ratios of {', '.join(PASSES)}. Call `refalign calibrate` again.")
    return ratios


def _are_ratios(ratios: object) -> bool:
    if not isinstance(ratios, dict) or set(ratios) != set(PASSES):
        return False
    values = [value for one in ratios.values() if isinstance(one, list) for value in one]
    return all(map(bool, ratios.values())) and all(isinstance(value, (int, float)) and value > 0 for value in values)
