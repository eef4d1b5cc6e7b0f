"""`dpo-kernels judge` and `dpo-kernels judge eval FILE`."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..train.config_files import UserError
from .options_of import add_options, given, printed


def add(commands: Any) -> None:
    from ..iterate.command_options import JudgeConfig

    judge = commands.add_parser(
        "judge",
        help="compare samples; `judge eval FILE`: how far a judge can be trusted",
        usage="dpo-kernels judge [CONFIG.yaml] [OPTIONS] | judge eval FILE [OPTIONS]",
        description="Ask a judge which of two samples of a prompt is better, in both orders. With "
        "`eval FILE` (rows prompt, output_1, output_2, label) its agreement with the labels, swap "
        "consistency, ties, errors and length bias, as a table and a chart.",
        epilog="example: dpo-kernels judge eval llmbar.jsonl --judge llm "
        "--base_url http://127.0.0.1:8000/v1 --model judge --output_dir runs/judge",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    judge.add_argument("action", nargs="*", metavar="eval FILE", help="pairs with known answers")
    judge.add_argument(
        "--output_dir", metavar="FOLDER", help="eval: folder of the table, verdicts and chart"
    )
    add_options(judge, (JudgeConfig,), {}, skip=("extra_body",))
    judge.set_defaults(run=run, command=judge, trl=True)


def run(args: argparse.Namespace) -> int:
    from ..iterate.command_options import JudgeConfig
    from ..iterate.settings import JudgeOptions, load_options
    from ..train.console import Console

    options = given(args)
    action, folder = options.pop("action", []), options.pop("output_dir", None)
    console = Console()
    if action:
        if len(action) != 2 or action[0] != "eval":
            raise UserError(f"judge takes `eval FILE`, got {' '.join(action)!r}")
        config = load_options(JudgeOptions, options)
        if printed(args, config):
            return 0
        with console.signals():
            return _evaluate(config, action[1], folder, console)
    if folder is not None:
        raise UserError("--output_dir belongs to `judge eval`; `judge` writes --output")
    config = load_options(JudgeConfig, options)
    if printed(args, config):
        return 0
    with console.signals():
        return _judge(config, console)


def _judge(config: Any, console: Any) -> int:
    from ..iterate.judges import make_judge
    from ..iterate.records import read_samples
    from ..iterate.verdicts import judge_samples
    from ..train.ranks_start import joined

    # Verdicts are written by the batch; what a run that is cut has paid for is kept here till then.
    kept = Path(f"{config.output}.replies")
    given = replace(config, cache_dir=config.cache_dir or str(kept))
    with joined({}, console) as ranks:
        with ranks.together():
            samples = read_samples(config.samples)
            judge = make_judge(given, ranks=ranks)
        counts = judge_samples(samples, judge, config.output, config.compare, console, ranks)
        ranks.first_does(lambda: shutil.rmtree(kept, ignore_errors=True))
        _say_requests(judge, console)
    console.say(f"{counts.describe()}; in {config.output}")
    return 1 if counts.verdicts and counts.errors == counts.verdicts else 0


def _evaluate(config: Any, file: str, folder: str | None, console: Any) -> int:
    from ..iterate.judge_eval import eval_table, evaluate_judge, plot_eval, read_labelled
    from ..iterate.judges import make_judge
    from ..train.start import refuse_many_processes

    refuse_many_processes("judge eval")
    pairs = read_labelled(file)
    judge: Any = make_judge(config)
    place = Path(folder) if folder else None
    table = evaluate_judge(judge, pairs, place)
    _say_requests(judge, console)
    console.say(f"judge {judge.name} on {file}")
    console.say(eval_table(table))
    if place is not None:
        try:
            plot_eval(table, place / "judge_eval.png", judge.name)
        except ImportError as error:
            console.say(f"warning: judge_eval.png was not drawn: {error}")
        console.say(f"written to {place}")
    return 1 if table[0].errors == 1.0 else 0


def _say_requests(judge: Any, console: Any) -> None:
    if getattr(judge, "endpoint", None) is not None:
        console.say(judge.endpoint.describe(*judge.endpoint.counted()))
