"""The commands: a module each, with `add(commands)`, which registers its parser and `run(args)`.

Importing one is light: what it works with is imported when it runs.
"""

from . import (
    bench_command,
    data_command,
    doctor_command,
    generate_command,
    iterate_command,
    judge_command,
    pairs_command,
    report_command,
    run_command,
    score_command,
    sft_command,
    sweep_command,
    train_command,
    verify_command,
)

COMMANDS = (
    train_command,
    run_command,
    sft_command,
    score_command,
    data_command,
    generate_command,
    judge_command,
    pairs_command,
    iterate_command,
    sweep_command,
    verify_command,
    bench_command,
    report_command,
    doctor_command,
)
