"""Feature files to pack."""

import pytest
import torch


def write(folder, mels):
    for name, mel in mels.items():
        torch.save(mel, folder / name)
    return folder, mels


@pytest.fixture
def files(tmp_path):
    """A folder with a few files, and what they hold."""
    torch.manual_seed(0)
    folder = tmp_path / "data"
    folder.mkdir()
    return write(
        folder, {f"{i}.pt": torch.randn(5 + i, 40) * 8 - 4 for i in range(7)}
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough files that several processes pack them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("many")
    return write(
        folder, {f"{i}.pt": torch.randn(20 + i % 7, 40) for i in range(400)}
    )
