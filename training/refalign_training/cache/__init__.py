"""
`refalign-train cache`: compute once what the frozen encoders give of a dataset, so that training does not.

    refalign-train cache --data opens2v --annotations Jsons/part1.json --videos Videos \
        --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --teacher facebook/dinov3-vitb16-pretrain-lvd1689m --output CACHE
    accelerate launch --num_processes 8 -m refalign_training.cli cache ...     # eight processes share the work
    refalign-train cache --output CACHE --status

Run again, it computes what is missing. [`refalign_training.cache.reader`] says what lies in the folder, and reads it.
"""

from refalign_training.cache.command import CacheCommand, check


def run(command: CacheCommand) -> int:
    """Does what the command says and returns the exit code. Raises ValueError if the command does not fit together."""
    asked = [name for name in ("status", "verify", "prune") if getattr(command, name)]
    if len(asked) > 1:
        raise ValueError(f"--{', --'.join(asked)} do not go together. Pass one of them.")
    if asked:
        from refalign_training.cache import checks

        return getattr(checks, asked[0])(command.output)
    check(command)
    from refalign_training.cache import writer

    return writer.fill(command)
