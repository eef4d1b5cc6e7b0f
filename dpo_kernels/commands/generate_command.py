"""`dpo-kernels generate`."""

from __future__ import annotations

import argparse
from typing import Any

from .options_of import add_options, given, printed


def add(commands: Any) -> None:
    from ..iterate.command_options import GenerateConfig

    generate = commands.add_parser(
        "generate",
        help="sample completions of prompts",
        usage="dpo-kernels generate [CONFIG.yaml] [OPTIONS]",
        description="Draw samples of each prompt from a model here or from an OpenAI-compatible "
        "server. A run that was cut goes on; the file is there when it is whole.",
        epilog="example: dpo-kernels generate --prompts prompts.jsonl --output samples.jsonl "
        "--base_url http://127.0.0.1:8000/v1 --model policy --num_samples 8",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(generate, (GenerateConfig,), {}, skip=("extra_body",))
    generate.set_defaults(run=run, command=generate, trl=True)


def run(args: argparse.Namespace) -> int:
    from ..iterate.command_options import GenerateConfig
    from ..iterate.endpoint import Endpoint
    from ..iterate.local_models import LocalModel
    from ..iterate.records import read_prompts
    from ..iterate.sampling import generate
    from ..iterate.settings import load_options
    from ..train.console import Console
    from ..train.ranks_start import joined

    config = load_options(GenerateConfig, given(args))
    if printed(args, config):
        return 0
    console = Console()
    source: Any
    with console.signals(), joined({"device": config.device}, console) as ranks:
        with ranks.together():
            prompts = read_prompts(config.prompts)
            name = config.model_name_or_path
            if name:
                source = LocalModel.load(name, config.device, config.gguf_file)
            else:
                source = Endpoint(config, ranks=ranks)
        counts = generate(prompts, source, config, config.output, console, ranks)
        told = source.describe(*source.counted()) if isinstance(source, Endpoint) else ""
    if told:
        console.say(told)
    console.say(f"{counts.samples} samples of {counts.prompts} prompts in {config.output}")
    if counts.errors:
        console.say(f"{counts.errors} samples are missing; the first error: {counts.first_error}")
    return 1 if counts.errors else 0
