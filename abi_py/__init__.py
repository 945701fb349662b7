"""Train Llama, Mistral, Qwen, GPT-2 on a CPU: every forward and backward pass by hand, in NumPy and Numba.

    import abi_py as abi

The names are those of the ABI (`abi.ai` there).  They are loaded when they are first used, so the import itself takes
a few milliseconds and compiles nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import abi as abi
    from . import config as config
    from . import data as data
    from . import errors as errors
    from . import formats as formats
    from . import generation as generation
    from . import gradcheck as gradcheck
    from . import kernels as kernels
    from . import model as model
    from . import parameters as parameters
    from . import trainable_model as trainable_model
    from . import training as training
    from . import verification as verification
    from .abi import Checkpoint as Checkpoint
    from .abi import CheckpointStore as CheckpointStore
    from .abi import CrossEntropyLoss as CrossEntropyLoss
    from .abi import FocalLoss as FocalLoss
    from .abi import GradientAccumulator as GradientAccumulator
    from .abi import LlmCheckpoint as LlmCheckpoint
    from .abi import LoraAdapter as LoraAdapter
    from .abi import MixedPrecisionContext as MixedPrecisionContext
    from .abi import MSELoss as MSELoss
    from .abi import TrainingLogger as TrainingLogger
    from .abi import TrainingLogMetric as TrainingLogMetric
    from .abi import calculate_learning_rate as calculate_learning_rate
    from .abi import clip_gradients as clip_gradients
    from .abi import kl_divergence as kl_divergence
    from .abi import load_checkpoint as load_checkpoint
    from .abi import load_llm_checkpoint as load_llm_checkpoint
    from .abi import perplexity as perplexity
    from .abi import read_token_bin_file as read_token_bin_file
    from .abi import save_checkpoint as save_checkpoint
    from .abi import save_llm_checkpoint as save_llm_checkpoint
    from .abi import write_token_bin_file as write_token_bin_file
    from .config import CheckpointingStrategy as CheckpointingStrategy
    from .config import EarlyStoppingConfig as EarlyStoppingConfig
    from .config import LearningRateSchedule as LearningRateSchedule
    from .config import LlmTrainingConfig as LlmTrainingConfig
    from .config import LoraConfig as LoraConfig
    from .config import OptimizerType as OptimizerType
    from .config import TrainableModelConfig as TrainableModelConfig
    from .data.batch import Batch as Batch
    from .data.chat import load_template as load_template
    from .data.chat_dataset import ChatDataset as ChatDataset
    from .data.instructions import InstructionSample as InstructionSample
    from .data.instructions import parse_instruction_dataset as parse_instruction_dataset
    from .data.packing import SequencePacker as SequencePacker
    from .data.selection import select_conversations as select_conversations
    from .data.token_batches import BatchIterator as BatchIterator
    from .data.tokenizer import Tokenizer as Tokenizer
    from .data.tokens import DataLoader as DataLoader
    from .data.tokens import TokenizedDataset as TokenizedDataset
    from .generation import Generation as Generation
    from .generation import GenerationConfig as GenerationConfig
    from .generation import Generator as Generator
    from .generation import generate as generate
    from .generation import generate_stream as generate_stream
    from .model.lora import LoraModel as LoraModel
    from .model.loss_output import LossOutput as LossOutput
    from .model.transformer import TrainableModel as TrainableModel
    from .training.precision import LossScaler as LossScaler
    from .training.precision import LossScalerStats as LossScalerStats
    from .training.precision import MixedPrecisionConfig as MixedPrecisionConfig
    from .training.precision import fp16_to_fp32 as fp16_to_fp32
    from .training.precision import fp32_to_fp16 as fp32_to_fp16
    from .training.range_test import RangeTest as RangeTest
    from .training.range_test import find_learning_rate as find_learning_rate
    from .training.report import EvalResult as EvalResult
    from .training.report import StepMetrics as StepMetrics
    from .training.report import TrainingReport as TrainingReport
    from .training.report import TrainingStats as TrainingStats
    from .training.stop import GracefulStop as GracefulStop
    from .training.trainer import LlamaTrainer as LlamaTrainer
    from .training.trainer import train_llm as train_llm
    from .training.trainer import train_llm_with_validation as train_llm_with_validation

# Name -> module that defines it; a test holds these names equal to `__all__`.
_HOMES = {
    "Batch": "data.batch",
    "BatchIterator": "data.token_batches",
    "ChatDataset": "data.chat_dataset",
    "CheckpointingStrategy": "config",
    "DataLoader": "data.tokens",
    "EarlyStoppingConfig": "config",
    "EvalResult": "training.report",
    "GracefulStop": "training.stop",
    "InstructionSample": "data.instructions",
    "LearningRateSchedule": "config",
    "LlamaTrainer": "training.trainer",
    "LlmTrainingConfig": "config",
    "LoraConfig": "config",
    "LoraModel": "model.lora",
    "LossOutput": "model.loss_output",
    "LossScaler": "training.precision",
    "LossScalerStats": "training.precision",
    "MixedPrecisionConfig": "training.precision",
    "OptimizerType": "config",
    "SequencePacker": "data.packing",
    "StepMetrics": "training.report",
    "TokenizedDataset": "data.tokens",
    "Tokenizer": "data.tokenizer",
    "TrainableModel": "model.transformer",
    "TrainableModelConfig": "config",
    "TrainingReport": "training.report",
    "TrainingStats": "training.report",
    "fp16_to_fp32": "training.precision",
    "fp32_to_fp16": "training.precision",
    "Generation": "generation",
    "GenerationConfig": "generation",
    "Generator": "generation",
    "generate": "generation",
    "generate_stream": "generation",
    "load_template": "data.chat",
    "parse_instruction_dataset": "data.instructions",
    "select_conversations": "data.selection",
    "Checkpoint": "abi",
    "CheckpointStore": "abi",
    "CrossEntropyLoss": "abi",
    "FocalLoss": "abi",
    "GradientAccumulator": "abi",
    "LlmCheckpoint": "abi",
    "LoraAdapter": "abi",
    "MSELoss": "abi",
    "MixedPrecisionContext": "abi",
    "TrainingLogMetric": "abi",
    "TrainingLogger": "abi",
    "calculate_learning_rate": "abi",
    "clip_gradients": "abi",
    "kl_divergence": "abi",
    "load_checkpoint": "abi",
    "load_llm_checkpoint": "abi",
    "perplexity": "abi",
    "read_token_bin_file": "abi",
    "save_checkpoint": "abi",
    "save_llm_checkpoint": "abi",
    "write_token_bin_file": "abi",
    "RangeTest": "training.range_test",
    "find_learning_rate": "training.range_test",
    "train_llm": "training.trainer",
    "train_llm_with_validation": "training.trainer",
}
_MODULES = (
    "abi",
    "config",
    "data",
    "errors",
    "formats",
    "generation",
    "gradcheck",
    "kernels",
    "model",
    "parameters",
    "trainable_model",
    "training",
    "verification",
)

__all__ = [  # noqa: RUF022 (in the order in which a program needs them; a test holds it equal to the tables above)
    "__version__",
    "TrainableModelConfig",
    "CheckpointingStrategy",
    "TrainableModel",
    "LossOutput",
    "LoraConfig",
    "LoraModel",
    "Tokenizer",
    "TokenizedDataset",
    "Batch",
    "BatchIterator",
    "DataLoader",
    "SequencePacker",
    "InstructionSample",
    "parse_instruction_dataset",
    "select_conversations",
    "load_template",
    "ChatDataset",
    "LlmTrainingConfig",
    "OptimizerType",
    "LearningRateSchedule",
    "EarlyStoppingConfig",
    "MixedPrecisionConfig",
    "LossScaler",
    "LossScalerStats",
    "fp32_to_fp16",
    "fp16_to_fp32",
    "LlamaTrainer",
    "StepMetrics",
    "TrainingStats",
    "TrainingReport",
    "EvalResult",
    "GracefulStop",
    "find_learning_rate",
    "RangeTest",
    "train_llm",
    "train_llm_with_validation",
    "generate",
    "generate_stream",
    "GenerationConfig",
    "Generator",
    "Generation",
    "Checkpoint",
    "CheckpointStore",
    "CrossEntropyLoss",
    "FocalLoss",
    "GradientAccumulator",
    "LlmCheckpoint",
    "LoraAdapter",
    "MSELoss",
    "MixedPrecisionContext",
    "TrainingLogMetric",
    "TrainingLogger",
    "calculate_learning_rate",
    "clip_gradients",
    "kl_divergence",
    "load_checkpoint",
    "load_llm_checkpoint",
    "perplexity",
    "read_token_bin_file",
    "save_checkpoint",
    "save_llm_checkpoint",
    "write_token_bin_file",
    "abi",
    "config",
    "data",
    "errors",
    "formats",
    "generation",
    "gradcheck",
    "kernels",
    "model",
    "parameters",
    "trainable_model",
    "training",
    "verification",
]


def _load(name: str) -> Any:
    """Import what was asked for, at its first use (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"abi_py has no {name!r}; dir(abi_py) lists what it has")
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a type checker knows the names above, and would take any other for one of these
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted(__all__)
