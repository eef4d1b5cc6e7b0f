"""A DPO script as TRL's users write it; it knows nothing of dpo_kernels.

`compare_trl.py` runs it as it is and after `patch_trl()`. The model has random weights and the
vocabulary of a small real one (SmolLM2: 49152, tied), the pairs have the prompt and completion
lengths asked for; or `--model` and `--rows` name a folder and a file of rows. The last line it
prints is its own measurement.
"""

import argparse
import json
import random
import resource
import statistics
import tempfile
import time

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--prompt", type=int, default=128, help="mean tokens of a prompt")
parser.add_argument("--completion", type=int, default=64, help="mean tokens of a completion")
parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--hidden", type=int, default=576)
parser.add_argument("--vocabulary", type=int, default=49152)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--model", help="a folder, in place of random weights")
parser.add_argument("--rows", help="a JSONL file, in place of random pairs")
parser.add_argument("--max_length", type=int, default=1024)
options = parser.parse_args()

torch.set_num_threads(options.threads)
V = options.vocabulary


def random_model() -> str:
    """A folder with the model and its tokenizer."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        max_position_embeddings=1 << 16,
    )
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_rows() -> Dataset:
    draw = random.Random(0)

    def text(mean: int) -> str:
        n = draw.randint(mean // 2, mean * 3 // 2)
        return " ".join(f"w{draw.randrange(2, V)}" for _ in range(n))

    rows = [
        {
            "prompt": text(options.prompt),
            "chosen": " " + text(options.completion),
            "rejected": " " + text(options.completion),
        }
        for _ in range(options.pairs * 4)
    ]
    return Dataset.from_list(rows)


class Clock(TrainerCallback):
    """Of each step: seconds of the clock and of all cores, tokens that the policy's trunk gets."""

    def __init__(self):
        self.seconds, self.cpu_seconds, self.tokens, self.counted = [], [], [], 0

    def count(self, module, args, output):
        self.counted += args[0].numel()

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter(), time.process_time(), self.counted

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start[0])
        self.cpu_seconds.append(time.process_time() - self.start[1])
        self.tokens.append(self.counted - self.start[2])


clock = Clock()
dataset = (
    load_dataset("json", data_files=options.rows, split="train") if options.rows else random_rows()
)
trainer = DPOTrainer(
    model=options.model or random_model(),
    args=DPOConfig(
        tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=options.pairs,
        learning_rate=1e-5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        max_length=options.max_length,
    ),
    train_dataset=dataset,
    callbacks=[clock],
)
trainer.model.get_input_embeddings().register_forward_hook(clock.count)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.train()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
result = {
    "seconds": clock.seconds,
    "cpu_seconds": clock.cpu_seconds,
    "peak_mb": after // 1024,
    "peak_before_mb": before // 1024,
    "tokens": statistics.mean(clock.tokens[1:] or clock.tokens),  # the first has checks beside it
    "losses": losses,
}
print(json.dumps(result))
