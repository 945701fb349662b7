"""Train the DeepZig conversational model: 8 layers of width 512, with the seven flags of the original script.

    python examples/train_medium.py                                      all weights, on the package's own conversations
    python examples/train_medium.py --data my.jsonl --epochs 5 --max-samples 20000
    python examples/train_medium.py --model-size test --output-dir tiny  a model that is done in a minute
    python examples/train_medium.py --base tiny --data my.jsonl --use-lora --lora-rank 16 --output-dir tuned

`abi-train deepzig --model-size seed` does the same with more to see; this is how a program of yours would call it.
Afterwards: abi-train chat deepzig-conversational-model
"""

import argparse
from typing import Any

import abi_py as abi
from abi_py.pipelines import train_deepzig
from abi_py.training.console import ConsoleSink
from abi_py.training.loading import load_model


def parse() -> argparse.Namespace:
    """Read the flags; what is not given is left to the size of the model."""
    parser = argparse.ArgumentParser(description="Train the DeepZig conversational model.")
    parser.add_argument("--use-lora", action="store_true", help="train adapters of low rank beside frozen weights")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--max-samples", type=int, help="most conversations to use (0 = all)")
    parser.add_argument("--eval-split", type=float, help="share kept for evaluation (0 = none)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--output-dir")
    parser.add_argument("--data", nargs="+", help="files of conversations; the package's own without it")
    parser.add_argument("--model-size", choices=["test", "small", "medium", "large", "seed"])
    parser.add_argument("--base", help="folder of a trained model to go on from")
    return parser.parse_args()


def settings_of(flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what was given by section, as in the config.yaml of a run."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"path": flags.data, "valid_fraction": flags.eval_split},
        "base": {"path": flags.base},
        "training": {"epochs": flags.epochs, "batch_size": flags.batch_size},
        "chat": {"max_samples": flags.max_samples},
        "lora": {"enabled": flags.use_lora or flags.lora_rank is not None or None, "rank": flags.lora_rank},
    }
    return {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in settings.items()
    }


def main() -> None:
    """Train, then ask one question."""
    flags = parse()
    size = flags.model_size or (None if flags.base else "seed")
    report, run = train_deepzig(settings_of(flags), [ConsoleSink()], size=size, out=flags.output_dir)
    print(f"{report.total_steps} steps, training loss {report.final_loss:.4f}, evaluation {report.best_val_loss:.4f}")
    folder = run / "model"
    print(f"model in {folder}:", *sorted(path.name for path in folder.iterdir()))

    tokenizer = abi.Tokenizer.load(folder)
    template = abi.data.template_for(tokenizer)
    encoder = template.encoder(tokenizer)
    prompt = encoder.encode_prompt([{"role": "user", "content": "What is Zig?"}])
    settings = abi.GenerationConfig.load(folder).replace(max_new_tokens=100)
    (answer,) = abi.Generator(load_model(folder).model, tokenizer).run([prompt], settings)
    print("\nWhat is Zig?\n" + (answer.text or ""))


if __name__ == "__main__":
    main()
