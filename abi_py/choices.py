"""What a training may choose from; `config.py` has the fields that take them, and hands these names on."""

from enum import Enum

__all__ = [
    "BaseStorage",
    "CooldownShape",
    "ExportFormat",
    "LearningRateSchedule",
    "LossOn",
    "MergeBase",
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
    ADAMW_8BIT = "adamw_8bit"
    MUON = "muon"

    @classmethod
    def _missing_(cls, value: object) -> "OptimizerType | None":
        """Read the names of transformers' TrainingArguments and of bitsandbytes, too."""
        others = {"adamw_torch": cls.ADAMW, "adamw_bnb_8bit": cls.ADAMW_8BIT, "adamw8bit": cls.ADAMW_8BIT}
        return others.get(str(value))


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


class BaseStorage(str, Enum):
    """What the matrices under adapters may be encoded in when they are read: the names of `kernels/storage`."""

    NF4_DQ = "nf4-dq"
    NF4 = "nf4"
    Q8_0 = "q8_0"
    Q6_K = "q6_k"
    Q5_K = "q5_k"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_K = "q4_k"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"
    IQ4_NL = "iq4_nl"
    MXFP4 = "mxfp4"
    Q3_K = "q3_k"
    Q2_K = "q2_k"
    BF16 = "bf16"
    FLOAT16 = "float16"


class MergeBase(str, Enum):
    """Which weights adapters are merged into that were trained on encoded ones."""

    ORIGINAL = "original"
    DEQUANT = "dequant"
