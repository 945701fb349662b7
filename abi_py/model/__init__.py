"""The model: parameters in, logits or loss and gradients out.

    transformer.py   TrainableModel: the list of operations, forward and backward
    block.py         one layer of it
    activations.py   the arrays between the operations, and what gradient checkpointing keeps of them
"""

from .transformer import LossOutput, TrainableModel

__all__ = ["LossOutput", "TrainableModel"]
