"""The modules in somebody else's recipe, far from this repository's tree."""

import subprocess
import sys

import pytest

YAML = """
encoder: !new:spkid.models.ConformerEncoder
    input_size: 80
    d_model: 32
    n_layers: 1
    n_heads: 2
    d_ff: 64
pooling: !new:spkid.models.SelfAttentivePooling
    input_size: 32
embedding_model: !new:spkid.models.SpeakerEmbedding
    encoder: !ref <encoder>
    pooling: !ref <pooling>
classifier: !new:spkid.models.AMSoftmax
    input_size: 32
    n_speakers: 3
    margin: 0.3
modules:
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
opt_class: !name:torch.optim.Adam
    lr: 0.01
"""

RECIPE = """
import sys
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

class Brain(sb.Brain):
    def compute_forward(self, batch, stage):
        x, lengths, targets = batch
        embeddings = self.modules.embedding_model(x, lengths)
        return self.modules.classifier(embeddings, targets)
    def compute_objectives(self, predictions, batch, stage):
        return sb.nnet.losses.nll_loss(predictions, batch[2])
    def on_stage_end(self, stage, stage_loss, epoch=None):
        print(stage_loss)

with open(sys.argv[1]) as file:
    hparams = load_hyperpyyaml(file)
torch.manual_seed(0)
targets = torch.arange(6).reshape(6, 1) % 3
x = torch.randn(6, 20, 80) + 2 * targets.unsqueeze(1)
batch = (x, torch.tensor([1.0, 0.5, 0.3, 1.0, 0.9, 0.05]), targets)
brain = Brain(hparams["modules"], hparams["opt_class"], hparams)
loader = torch.utils.data.DataLoader([batch], batch_size=None)
brain.fit(range(30), loader, progressbar=False)
"""


@pytest.mark.slow
def test_the_modules_learn_in_a_plain_speechbrain_recipe(tmp_path):
    (tmp_path / "theirs.yaml").write_text(YAML)
    (tmp_path / "recipe.py").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "recipe.py", "theirs.yaml"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 30
    assert losses[-1] < 0.1 * losses[0]
