"""Train the DeepZig conversational model: 8 layers of width 512, with the seven flags of the original script.

    python examples/train_medium.py                                      all weights, on the package's own conversations
    python examples/train_medium.py --data my.jsonl --epochs 5 --max-samples 20000
    python examples/train_medium.py --model-size test --output-dir tiny  a model that is done in a minute
    python examples/train_medium.py --base tiny --data my.jsonl --use-lora --lora-rank 16 --output-dir tuned

`abi-train deepzig --model-size seed` does the same with more to see; this is how a program of yours would call it.
Afterwards: abi-train chat deepzig-conversational-model
"""

import argparse
from pathlib import Path

import abi_py as abi
from abi_py.pipelines import DeepZigConfig, train_deepzig
from abi_py.training.console import ConsoleSink
from abi_py.training.loading import load_model


def parse() -> argparse.Namespace:
    """Read the flags; what is not given is left to the size of the model."""
    parser = argparse.ArgumentParser(description="Train the DeepZig conversational model.")
    parser.add_argument("--use-lora", action="store_true", help="train adapters of low rank beside frozen weights")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--max-samples", type=int, help="most conversations to use (0 = all)")
    parser.add_argument("--eval-split", type=float, default=0.1, help="share kept for evaluation (0 = none)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--output-dir")
    parser.add_argument("--data", nargs="+", default=[], help="files of conversations; the package's own without it")
    parser.add_argument("--model-size", choices=["test", "small", "medium", "large", "seed"])
    parser.add_argument("--base", help="folder of a trained model to go on from")
    return parser.parse_args()


def main() -> None:
    """Train, then ask one question."""
    arguments = vars(parse())
    if arguments["base"] is None:
        arguments["model_size"] = arguments["model_size"] or "seed"
    report, folder = train_deepzig(DeepZigConfig.from_dict(arguments), [ConsoleSink()])
    print(f"{report.total_steps} steps, training loss {report.final_loss:.4f}, evaluation {report.best_val_loss:.4f}")
    print(f"model in {folder}:", *sorted(path.name for path in Path(folder).iterdir()))

    tokenizer = abi.Tokenizer.load(folder)
    template = abi.data.template_for(tokenizer)
    encoder = template.encoder(tokenizer)
    prompt = encoder.encode_prompt([{"role": "user", "content": "What is Zig?"}])
    settings = abi.GenerationConfig.load(folder).replace(max_new_tokens=100)
    (answer,) = abi.Generator(load_model(folder).model, tokenizer).run([prompt], settings)
    print("\nWhat is Zig?\n" + (answer.text or ""))


if __name__ == "__main__":
    main()
