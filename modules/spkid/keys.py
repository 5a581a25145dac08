"""The keys of a YAML file: what each may be, and when it may change."""

from __future__ import annotations

from typing import Any, NamedTuple

from spkid.audio import SILENCES
from spkid.data import DTYPES, POLICIES, SAMPLERS, SPEAKERS
from spkid.errors import UserError
from spkid.evaluation import EVALUATIONS
from spkid.features import NORMALIZATIONS
from spkid.sessions import SOURCES, SPLITS

FIXED, FREE, SCORING = "fixed", "free", "scoring"
TEXT, FLAG, OBJECT = "a text", "True or False", "an object"
OPTIONAL = "a text or null"
HUGE = 2**31 - 1


class Range(NamedTuple):
    """From low to high; whole numbers if both are."""

    low: float
    high: float
    open: bool = False  # whether the ends themselves are left out

    def check(self, value: Any, key: str) -> None:
        """Raises UserError unless the value is a number in this range."""
        whole = isinstance(self.low, int)
        kinds: tuple[type, ...] = (int,) if whole else (int, float)
        if type(value) not in kinds:  # True is no number
            shown = "null" if value is None else value
            raise UserError(
                f"{key}={shown} must be {'a whole' if whole else 'a'} number."
            )
        inside = self.low <= value <= self.high
        if self.open:
            inside = self.low < value < self.high
        if not inside:
            ends = "()" if self.open else "[]"
            raise UserError(
                f"{key}={value} must lie in {ends[0]}{self.low}, "
                f"{self.high}{ends[1]}."
            )


class Key(NamedTuple):
    """What a key may be, and whether a resumed run may change it."""

    allowed: Range | tuple | str
    change: str = FIXED


COUNT, SHARE = Range(1, HUGE), Range(0.0, 1.0)
# FREE: moves no number, a resumed run may change it. SCORING: changes how
# utterances are scored, and nothing that is trained: --test_only may change it.
KEYS = {
    "seed": Key(Range(0, 2**32 - 1)),
    "data_folder": Key(OPTIONAL, FREE),
    "pack_folder": Key(OPTIONAL, FREE),
    "output_folder": Key(TEXT, FREE),
    "save_folder": Key(TEXT, FREE),
    "manifest_folder": Key(TEXT, FREE),
    "train_log": Key(TEXT, FREE),
    "pack": Key(FLAG),
    "pack_dtype": Key(DTYPES),
    "pack_on_device": Key(FLAG, FREE),
    "on_bad_file": Key(POLICIES, FREE),
    "max_bad_share": Key(SHARE, FREE),
    "speakers": Key(SPEAKERS, FREE),  # the data's digest tells them
    "silence": Key(SILENCES, FREE),  # the features' digest tells it
    "split": Key(SPLITS),
    "sessions": Key(SOURCES),
    "valid_fraction": Key(Range(0.0, 1.0, open=True)),
    "known_fraction": Key(SHARE),
    "n_folds": Key(Range(2, 1000)),
    "fold": Key(Range(0, HUGE)),
    "final_fit": Key(FLAG, FREE),
    "init_from": Key(OPTIONAL),
    "number_of_epochs": Key(COUNT),
    "batch_size": Key(Range(2, HUGE)),
    "segment_frames": Key(COUNT),
    "sampler": Key(SAMPLERS),
    "bucket_batches": Key(COUNT),
    "lr": Key(Range(0.0, 1e3)),
    "weight_decay": Key(Range(0.0, 1e3)),
    "label_smoothing": Key(SHARE),
    "grad_accumulation_factor": Key(COUNT),
    "nonfinite_patience": Key(Range(0, HUGE), FREE),
    "ckpt_interval_minutes": Key(Range(0.0, 1e9), FREE),
    "num_workers": Key(Range(0, 1024), FREE),
    "normalization": Key(NORMALIZATIONS),
    "max_frames_per_batch": Key(COUNT, FREE),
    "equal_length_batches": Key(FLAG, SCORING),
    "evaluation": Key(EVALUATIONS, SCORING),
    "window_frames": Key(COUNT, SCORING),
    "window_hop": Key(COUNT, SCORING),
    "average_checkpoints": Key(COUNT, SCORING),
    "d_model": Key(COUNT),
    "n_layers": Key(COUNT),
    "n_heads": Key(COUNT),
    "d_ff": Key(COUNT),
    "kernel_size": Key(COUNT),
    "dropout": Key(SHARE),
    "embedding_size": Key(COUNT),
    "use_tensorboard": Key(FLAG, FREE),
    "train_logger": Key(OBJECT, FREE),
    "tensorboard_logger": Key(OBJECT, FREE),
    "checkpointer": Key(OBJECT, FREE),
}
DECIDED_BY_DATA = ("n_speakers", "n_mels", "silence")
# The objects that a trained system is made of.
TRAINED = ("mean_var_norm", "embedding_model", "classifier")
# Of one model or optimiser; the recipe itself doesn't read them.
OWN = {
    *("lr", "weight_decay", "grad_accumulation_factor", "normalization"),
    *("d_model", "n_layers", "n_heads", "d_ff", "kernel_size", "dropout"),
    "embedding_size",
}
# What train.py reads.
NEEDED = (
    *(key for key in KEYS if key not in OWN),
    *(*DECIDED_BY_DATA, *TRAINED, "preprocess", "label_encoder", "modules"),
    *("opt_class", "lr_schedule", "epoch_counter"),
)
