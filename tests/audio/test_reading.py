"""Sound files of any format, also those whose headers lie."""

import os
import sys

import numpy as np
import pytest
import soundfile

from spkid.audio import read_speech
from spkid.audio.reading import at_16_khz, decode


def tones(rate, seconds=2.0, channels=1):
    """Sines of 440 Hz, 550 Hz, ... [samples, channels]."""
    time = np.arange(round(seconds * rate))[:, None] / rate
    pitch = 440 + 110 * np.arange(channels)
    return (0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def whole(path):
    rates, blocks = zip(*decode(path), strict=True)
    assert len(set(rates)) == 1
    return rates[0], np.concatenate(blocks)


def write_with_av(path, samples, rate):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="stereo")
        planar = np.ascontiguousarray(samples.T)
        frame = av.AudioFrame.from_ndarray(planar, "fltp", "stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize(
    ("ending", "error"),
    [("wav", 1e-4), ("FLAC", 1e-4), ("ogg", 0.02), ("Mp3", 0.02)],
)
def test_formats_of_libsndfile(tmp_path, monkeypatch, ending, rate, error):
    monkeypatch.setattr("spkid.audio.reading.BLOCK", 5000)
    path = tmp_path / f"tone.{ending}"
    samples = tones(rate, channels=2)
    soundfile.write(path, samples, rate, format=ending.upper())
    read_rate, read = whole(path)
    assert read_rate == rate and read.dtype == np.float32
    assert read.shape == samples.shape
    difference = (read - samples)[1000:-1000]
    assert np.sqrt(np.square(difference).mean()) < error


@pytest.mark.parametrize("ending", ["m4a", "AAC"])
def test_formats_of_ffmpeg(tmp_path, ending):
    samples = tones(44100, channels=2)
    write_with_av(tmp_path / f"x.{ending.lower()}", samples, 44100)
    path = tmp_path / f"x.{ending.lower()}"
    path = path.rename(tmp_path / f"tone.{ending}")
    rate, read = whole(path)
    assert rate == 44100 and read.dtype == np.float32
    assert len(samples) <= len(read) <= len(samples) + 3 * 1024
    # The encoder begins with up to 2,112 samples of its own.
    spectrum = np.abs(np.fft.rfft(read[4096 : 4096 + 44100], axis=0))
    assert spectrum.argmax(axis=0).tolist() == [440, 550]


def test_without_av_the_sentence_names_the_cure(tmp_path, monkeypatch):
    write_with_av(tmp_path / "tone.m4a", tones(44100, channels=2), 44100)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"tone\.m4a: .*`pip install av`"):
        read_speech(tmp_path / "tone.m4a")


def test_a_playlist_leads_nowhere(tmp_path):
    write_with_av(tmp_path / "secret.aac", tones(44100, channels=2), 44100)
    path = tmp_path / "list.m3u8"
    path.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n"
        f"{tmp_path / 'secret.aac'}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(ValueError, match="can't be read as sound"):
        whole(path)


@pytest.mark.parametrize("claimed", [0, 2**36 - 1])
def test_flac_with_a_wrong_length(tmp_path, claimed):
    path = tmp_path / "tone.flac"
    soundfile.write(path, tones(16000), 16000)
    content = bytearray(path.read_bytes())
    content[21] = content[21] & 0xF0 | claimed >> 32
    content[22:26] = (claimed & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)
    assert len(whole(path)[1]) == 32000


@pytest.mark.parametrize("claimed", [2**32 - 1, 2**31 - 2, 0])
def test_wav_with_a_wrong_length(tmp_path, claimed):
    if claimed == 0:  # the recorder was killed
        pytest.importorskip("av")
    path = tmp_path / "tone.wav"
    soundfile.write(path, tones(16000), 16000)
    content = bytearray(path.read_bytes())
    place = content.find(b"data") + 4
    content[place : place + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    assert len(whole(path)[1]) == 32000


@pytest.mark.parametrize(
    "name",
    [
        "tone.raw",
        pytest.param(
            os.fsdecode(b"Zo\xeb.wav"),
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="such names can't be there"
            ),
        ),
    ],
)
@pytest.mark.parametrize("ending", ["wav", "m4a"])
def test_files_of_any_name(tmp_path, name, ending):
    path = tmp_path / f"tone.{ending}"
    if ending == "wav":
        soundfile.write(path, tones(44100), 44100)
    else:
        write_with_av(path, tones(44100, channels=2), 44100)
    expected = whole(path)[1]
    path = path.rename(tmp_path / name)
    np.testing.assert_array_equal(whole(path)[1], expected)


def test_what_is_no_sound(tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.mp3").touch()
    (tmp_path / "folder.wav").mkdir()
    names = ["text.wav", "empty.mp3", "folder.wav", "missing.wav"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.wav")
        names.append("pipe.wav")
    for name in names:
        with pytest.raises(ValueError, match=rf"{name}: The file can't be"):
            read_speech(tmp_path / name)


def test_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr("spkid.audio.reading.BLOCK", 4096)
    path = tmp_path / "noise.flac"
    noise = np.random.default_rng(0).normal(0, 0.1, 160000)
    soundfile.write(path, noise, 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\0" * 9999)
    with pytest.raises(ValueError, match=r"damaged after|can't be read"):
        whole(path)


@pytest.mark.parametrize(
    "rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000]
)
def test_resampling_equals_the_formula_in_blocks_of_any_size(rate):
    samples = tones(rate, channels=2)
    once = np.concatenate(list(at_16_khz([(rate, samples)])))
    assert abs(len(once) - 32000) <= 1
    inside = slice(500, 31500)
    np.testing.assert_allclose(
        once[inside], tones(16000, channels=2)[inside], atol=1e-4
    )
    for size in (777, 4096):
        parts = [
            (rate, samples[start : start + size])
            for start in range(0, len(samples), size)
        ]
        blocks = list(at_16_khz(parts, 512))
        assert {len(block) for block in blocks[:-1]} == {512}
        np.testing.assert_allclose(np.concatenate(blocks), once, atol=1e-5)


@pytest.mark.parametrize(
    ("decoded", "message"),
    [
        ([(100, tones(16000))], "100 Hz is not within 4,000 to 768,000"),
        ([(16000, tones(8000)), (8000, tones(8000))], "changes within"),
        ([(8000, tones(8000, 1, 2)), (8000, tones(8000))], "changes within"),
        ([(8000, np.array([[0], [np.inf]]))], "not finite"),
        ([(44100, 3e38 * np.sign(tones(44100)))], "far too large"),
    ],
)
def test_what_cannot_be_resampled(decoded, message):
    with pytest.raises(ValueError, match=message):
        list(at_16_khz(decoded))
