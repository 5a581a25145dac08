"""The systems of hparams/: every YAML file, found in the folder."""

from pathlib import Path

import pytest
import torch

from spkid.hparams import Settings

SYSTEMS = sorted(Path(__file__).parents[2].glob("hparams/*.yaml"))
PARTS = ("mean_var_norm", "embedding_model", "classifier")


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_scores_do_not_depend_on_the_batch(path):
    """Padding included, unless the file asks for batches without it."""
    settings = Settings(path, {"n_speakers": 7})
    torch.manual_seed(0)
    normalize, embed, classify = (
        module.eval() for module in settings.build_modules(PARTS).values()
    )
    lengths = torch.tensor([1, 23, 29, 7])
    if settings.values["equal_length_batches"]:
        lengths = torch.full((4,), 29)
    utterances = [torch.randn(n, settings.values["n_mels"]) for n in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(
        utterances, batch_first=True, padding_value=1e4
    )

    def score(x, relative_lengths=None):
        embeddings = embed(normalize(x, relative_lengths), relative_lengths)
        return embeddings, classify(embeddings)

    with torch.no_grad():
        together = score(batch, lengths / 29)
        for row, utterance in enumerate(utterances):
            alone = score(utterance[None])
            for ours, expected in zip(together, alone, strict=True):
                scale = max(1.0, expected.abs().max())
                assert (ours[row] - expected[0]).abs().max() <= 1e-5 * scale
