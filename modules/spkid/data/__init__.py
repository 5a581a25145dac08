"""A corpus, its features on the disk, and batches of them."""

from spkid.data.batches import (
    LengthBatches,
    ShuffledBatches,
    crop_starts,
)
from spkid.data.build import DTYPES, open_features
from spkid.data.corpus import (
    POLICIES,
    SPEAKERS,
    Corpus,
    Utterance,
    leave_out,
    manifest,
    only_speakers,
)
from spkid.data.dataset import (
    SAMPLERS,
    FeatureDataset,
    eval_loader,
    label_encoder,
    train_loader,
)
from spkid.data.feature_file import (
    FeatureFiles,
    check_feature_files,
    load_feature_file,
)
from spkid.data.pack import PackedFeatures
from spkid.data.prepared import Recording
from spkid.data.recordings import prepare_audio

__all__ = [
    "Corpus",
    "DTYPES",
    "FeatureDataset",
    "FeatureFiles",
    "LengthBatches",
    "POLICIES",
    "PackedFeatures",
    "Recording",
    "SAMPLERS",
    "SPEAKERS",
    "ShuffledBatches",
    "Utterance",
    "check_feature_files",
    "crop_starts",
    "eval_loader",
    "label_encoder",
    "leave_out",
    "load_feature_file",
    "manifest",
    "only_speakers",
    "open_features",
    "prepare_audio",
    "train_loader",
]
