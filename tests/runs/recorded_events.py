"""Events of runs that never were, for the tests of what reads a run's directory."""

from abi_py.training.events import EvaluationEvent, StartEvent, StepEvent


def begin(step=0, total=20):
    counts = {"epoch": 1, "epochs": 2, "total_steps": total, "num_params": 12, "tokens_per_step": 100}
    return StartEvent(step=step, time=0.2 * step, flops_per_token=1.0, total_params=345, **counts)


def a_step(number, loss=2.0):
    values = {"epoch": 1, "accuracy": 0.5, "perplexity": 7.4, "learning_rate": 1e-3, "grad_norm": 0.7, "gflops": 1.0}
    values |= {"tokens": 100 * number, "tokens_per_second": 1000.0, "memory": 5, "logged": True}
    return StepEvent(step=number, time=0.2 * number, loss=loss, **values)


def an_evaluation(number, loss, bits=None):
    figures = {"val_loss": loss, "val_perplexity": 1.0, "val_accuracy": 0.5, "val_tokens": 9, "improved": True}
    return EvaluationEvent(step=number, time=0.2 * number, epoch=1, val_bits_per_byte=bits, **figures)
