"""What a training may choose from; `config.py` has the fields that take them, and hands these names on."""

from enum import Enum

__all__ = [
    "CooldownShape",
    "ExportFormat",
    "LearningRateSchedule",
    "LossOn",
    "MuonScale",
    "OptimizerType",
    "WeightType",
    "Which",
]


class OptimizerType(str, Enum):
    """The update rules."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"
    MUON = "muon"


class MuonScale(str, Enum):
    """What the learning rate of a matrix is multiplied by; the names are those of torch.optim.Muon."""

    MATCH_RMS_ADAMW = "match_rms_adamw"
    ORIGINAL = "original"


class LearningRateSchedule(str, Enum):
    """The learning-rate schedules; `training/schedule.py` has the formulas."""

    CONSTANT = "constant"
    COSINE = "cosine"
    WARMUP_COSINE = "warmup_cosine"
    LINEAR = "linear"
    STEP = "step"
    POLYNOMIAL = "polynomial"
    COSINE_WARM_RESTARTS = "cosine_warm_restarts"
    WSD = "wsd"


class CooldownShape(str, Enum):
    """How the rate falls at the end of `wsd`; the names are those of transformers."""

    LINEAR = "linear"
    ONE_MINUS_SQRT = "1-sqrt"


class LossOn(str, Enum):
    """Which tokens of a conversation are trained."""

    ASSISTANT = "assistant"
    ALL = "all"


class ExportFormat(str, Enum):
    """The form of the folder that a run leaves, or an export writes."""

    HF = "hf"
    ZIG = "zig"


class WeightType(str, Enum):
    """The type of its weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Which(str, Enum):
    """Which weights of a run are taken."""

    BEST = "best"
    LAST = "last"
