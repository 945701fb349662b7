"""The model: parameters in, logits or loss and gradients out.

    reference.py     the whole model on a page, forward and backward, in float64 NumPy: read this first
    transformer.py   the list of operations, forward and backward; TrainableModel: all of its weights are trained
    lora.py          LoraModel: low-rank adapters on a frozen model
    block.py         one layer
    linear.py        one linear layer of it: storage plus adapter
    inputs.py        ids, labels and marks, checked and laid out as rows
    activations.py   the arrays between the operations, and what gradient checkpointing keeps of them
"""

from .lora import LoraConfig, LoraModel
from .transformer import LossOutput, TrainableModel

__all__ = ["LoraConfig", "LoraModel", "LossOutput", "TrainableModel"]
