"""
`refalign-train cache`: compute once what the frozen encoders give of a dataset, so that training does not.

    refalign-train cache --data opens2v --annotations Jsons/part1.json --videos Videos \
        --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --teacher facebook/dinov3-vitb16-pretrain-lvd1689m --output CACHE
    accelerate launch --num_processes 8 -m refalign_training.cli cache ...     # or start it eight times: they share
    refalign-train cache --output CACHE --status

Run again, it goes on where it was, and computes only what has changed. [`refalign_training.cache.reader.Cache`] reads
it; what lies in its folder says [`refalign_training.cache.files`]. Nothing heavy is imported before it is needed, so
that `--help` answers at once.
"""

from refalign_training.cache.command import CacheCommand, check


def run(command: CacheCommand) -> int:
    """
    Does what the command says and returns the exit code.

    Raises:
        ValueError: if the command does not fit together, or another process works on the cache with other settings.
    """
    asked = [name for name in ("status", "verify", "prune") if getattr(command, name)]
    if len(asked) > 1:
        raise ValueError(f"Pass one of {', '.join(f'--{name}' for name in asked)} at a time.")
    if asked:
        from refalign_training.cache import checks

        return getattr(checks, asked[0])(command.output)
    check(command)
    from refalign_training.cache import fill

    return fill.fill(command)
