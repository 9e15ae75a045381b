"""Readers: the same frames whichever decodes them, in any order, and a typed reason where there are none."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stdit.data.decoding import DECORD_INSTALLED, DecodeError, PyAVReader, open_clip
from tests.support.videos import encode, lossless, smooth

DECODERS = ["auto", "decord"] if DECORD_INSTALLED else ["auto"]
needs_decord = pytest.mark.skipif(not DECORD_INSTALLED, reason="decord has no wheel for this platform")


def frames_of(path: Path, indices: Any = None, decoder: str = "auto") -> np.ndarray:
    with open_clip(path, decoder) as reader:
        return reader.get(range(reader.frame_count) if indices is None else indices)


def reason_of(path: Path, decoder: str = "auto") -> str:
    with pytest.raises(DecodeError) as caught:
        frames_of(path, decoder=decoder)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


# ------------------------------------------------------------------------------------------ videos


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_come_in_the_requested_order_and_are_exact(tmp_path: Path, decoder: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (11, 64, 80, 3), np.uint8)
    path = lossless(tmp_path / "a.mp4", frames)
    with open_clip(path, decoder) as reader:
        assert (reader.frame_count, reader.height, reader.width) == (11, 64, 80)
        assert reader.fps == pytest.approx(24)
        for indices in ([0], [10], [3, 9, 3, 0, 10], [4, 5, 6], range(11), []):
            assert (reader.get(indices) == frames[list(indices)]).all()
        with pytest.raises(DecodeError, match="frame 11 was asked for, the clip has 11"):
            reader.get([11])
        with pytest.raises(DecodeError, match="frame -1 was asked for"):
            reader.get([-1])


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options", "tolerance"),
    [
        ("a.mp4", "libx264", "yuv420p", {"g": "12", "bf": "3"}, 0),
        ("a.mkv", "libx264", "yuv420p", {"g": "12", "bf": "3"}, 0),
        ("a.mp4", "libx264", "yuvj420p", {}, 0),
        ("a.mp4", "libx264", "yuv444p", {}, 0),
        ("a.mp4", "libx264", "gray", {}, 0),
        ("a.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12:open-gop=0"}, 0),
        ("a.webm", "libvpx-vp9", "yuv420p", {"g": "12", "cpu-used": "8", "deadline": "realtime"}, 0),
        ("a.mp4", "mpeg4", "yuv420p", {"g": "12"}, 0),
        # Ten bits are brought to eight by different code in ffmpeg 4.1 and now.
        ("a.mp4", "libx264", "yuv420p10le", {}, 40),
    ],
)
@needs_decord
def test_decord_and_pyav_agree(
    tmp_path: Path, name: str, codec: str, pixels: str, options: dict[str, str], tolerance: int
) -> None:
    frames = smooth(30, 64, 80)
    path = encode(tmp_path / name, frames, codec, pixels, **options)
    indices = [0, 29, 5, 17, 17, 25, 3]
    found = [frames_of(path, indices, decoder).astype(int) for decoder in ("decord", "pyav")]
    assert np.abs(found[0] - found[1]).max() <= tolerance
    luma = frames[indices] @ np.array([[0.299], [0.587], [0.114]])
    assert np.abs(found[1] - (luma if pixels == "gray" else frames[indices])).mean() < 15
    assert (found[1] == frames_of(path, None, "pyav")[indices]).all()


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.avi", "libx264", {"g": "12", "bf": "0"}),
        ("a.ts", "libx264", {"g": "12"}),
        ("a.mp4", "libsvtav1", {"preset": "12"}),
    ],
)
def test_auto_is_pyav_which_reads_what_decord_cannot_be_trusted_with(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    frames = smooth(20, 64, 80)
    path = encode(tmp_path / name, frames, codec, **options)
    with open_clip(path) as reader:
        assert isinstance(reader, PyAVReader)
        assert np.abs(reader.get([13]).astype(int) - frames[[13]]).mean() < 15
    if DECORD_INSTALLED:
        assert reason_of(path, "decord").startswith("decord: ")


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
        ("libx265", {"x265-params": "log-level=none:keyint=12"}),
    ],
)
def test_open_gops_are_read_right_after_a_seek(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    path = encode(tmp_path / "a.mp4", smooth(40, 64, 80), codec, **options)
    whole = frames_of(path, None, "pyav")
    for index in (5, 11, 12, 13, 25, 39):
        assert (frames_of(path, [index]) == whole[[index]]).all()
    if DECORD_INSTALLED:
        assert reason_of(path, "decord") == "decord: open GOPs, through which it cannot seek"


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (12, 12), (17, 33), (50, 70), (1, 2)])
def test_small_and_odd_sizes_are_exact(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    assert (frames_of(lossless(tmp_path / "a.mp4", frames)) == frames).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotation_in_the_container_is_applied(
    tmp_path: Path, decoder: str, matrix: tuple[int, int, int, int], turns: int
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3), np.uint8)
    path = lossless(tmp_path / "a.mp4", frames)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: the matrix in the track header
    a, b, c, d = (entry << 16 for entry in matrix)
    raw[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
    with open_clip(path, decoder) as reader:
        upright = np.rot90(frames, turns, axes=(1, 2))
        assert (reader.height, reader.width) == upright.shape[1:3]
        assert (reader.get([2, 0]) == upright[[2, 0]]).all()


# ------------------------------------------------------------------------------- what ffmpeg shows


def assert_shows(path: Path, expected: np.ndarray, decoder: str = "auto", tolerance: int = 0) -> None:
    """The reader of `path` has exactly the frames `expected`: whole, strided, backwards and alone."""
    with open_clip(path, decoder) as reader:
        assert reader.frame_count == len(expected)
        for indices in (range(len(expected)), range(0, len(expected), 3), range(len(expected))[::-5], [7]):
            found = reader.get(indices).astype(int)
            assert np.abs(found - expected[list(indices)]).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.avi", "libx264", {"g": "12", "bf": "3"}),
        ("a.avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("a.h264", "libx264", {"g": "12", "bf": "3"}),
        ("a.m2v", "mpeg2video", {"g": "12", "bf": "2"}),
        ("a.ts", "libx264", {"g": "12", "bf": "3"}),
    ],
)
def test_frames_are_in_the_order_shown_where_the_container_has_no_times(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    frames = smooth(25, 64, 80)
    encode(tmp_path / name, frames, codec, **options)
    with av.open(str(tmp_path / name)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(expected) == 25
    assert np.abs(expected.astype(int) - frames).mean() < 15
    assert_shows(tmp_path / name, expected)


def test_frames_that_vp8_decodes_but_does_not_show_are_not_there(tmp_path: Path) -> None:
    """As alternate references, which libvpx makes in two passes: two frames that others refer to say that they are not
    shown."""
    path = encode(tmp_path / "a.webm", smooth(40, 64, 80), "libvpx", b="1M", g="16", **{"auto-alt-ref": "0"})
    raw = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for hidden in (5, 22):
        raw[raw.index(packets[hidden])] &= ~0x10  # RFC 6386, 9.1: show_frame
    path.write_bytes(raw)
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert (len(packets), len(expected)) == (40, 38)
    assert_shows(path, expected)


def cut_without_decoding(source: Path, path: Path, start: int, packets: int | None = None) -> None:
    """As `ffmpeg -ss START -c copy`: packets from the key frame before frame `start`, which an edit list hides up to
    it."""
    with av.open(str(source)) as container, av.open(str(path), "w", options={"use_editlist": "1"}) as out:
        stream = container.streams.video[0]
        copied: Any = out.add_stream_from_template(stream)
        found = [packet for packet in container.demux(stream) if packet.size]
        times = sorted(packet.pts or 0 for packet in found)
        key = max(i for i, packet in enumerate(found) if packet.is_keyframe and (packet.pts or 0) <= times[start])
        for packet in found[key:][:packets]:
            assert packet.pts is not None
            assert packet.dts is not None
            packet.pts, packet.dts = packet.pts - times[start], packet.dts - times[start]
            packet.stream = copied
            out.mux(packet)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize("options", [{"bf": "3"}, {"bf": "0"}])
def test_frames_that_an_edit_list_hides_are_not_there(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 80, 3), np.uint8)
    source = encode(tmp_path / "source.mp4", frames, "libx264rgb", "rgb24", qp="0", g="12", sc_threshold="0", **options)
    cut_without_decoding(source, tmp_path / name, start=17)
    assert_shows(tmp_path / name, frames[17:])
    if DECORD_INSTALLED:
        assert reason_of(tmp_path / name, "decord") == "decord: shows frames that the edit list hides"


def test_frames_behind_the_end_of_an_edit_list_are_not_there(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (24, 64, 80, 3), np.uint8)
    path = encode(tmp_path / "a.mp4", frames, "libx264rgb", "rgb24", qp="0", bf="0", g="12")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"elst") + 12  # ISO 14496-12, 8.6.6: duration and media time of the first edit
    duration, media_time = struct.unpack(">Ii", raw[at : at + 8])
    raw[at : at + 8] = struct.pack(">Ii", duration // 2, media_time)
    path.write_bytes(raw)
    assert_shows(path, frames[:12])


def test_frames_that_a_cut_left_without_their_key_frame_are_not_there(tmp_path: Path) -> None:
    frames = smooth(40, 64, 80)
    raw = encode(tmp_path / "a.ts", frames, g="12", bf="0").read_bytes()
    whole = frames_of(tmp_path / "a.ts")
    (tmp_path / "a.ts").write_bytes(raw[len(raw) // 188 // 4 * 188 :])
    found = frames_of(tmp_path / "a.ts")
    assert len(found) in (16, 28)
    assert (found == whole[-len(found) :]).all()


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p", {"lossless": "1"}),
        ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "b": "4M"}),
        ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("a.mov", "qtrle", "argb", {}),
        ("a.mov", "png", "rgba", {}),
    ],
)
def test_transparent_video_lies_over_white(
    tmp_path: Path, name: str, codec: str, pixels: str, options: dict[str, str]
) -> None:
    rgba = np.zeros((8, 64, 80, 4), np.uint8)
    rgba[:, :, :40] = (255, 0, 0, 128)
    rgba[:, :, 40:] = (0, 0, 255, 0)
    with av.open(str(tmp_path / name), "w") as container:
        stream: Any = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 80, pixels
        for frame in rgba:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba")))
        container.mux(stream.encode())
    found = frames_of(tmp_path / name).astype(int)
    assert np.abs(found[:, :, :32] - [255, 127, 127]).max() <= 8
    assert np.abs(found[:, :, 48:] - 255).max() <= 8
    if DECORD_INSTALLED:
        assert reason_of(tmp_path / name, "decord") == "decord: leaves transparency out"


# ---------------------------------------------------------------------------------------- bad files


def truncated(path: Path) -> None:
    raw = lossless(path, smooth(8, 64, 80)).read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.touch(), "is empty (0 bytes)"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.write_text("this is no video\n" * 50), "is a text file, not a clip; it begins 'this is no"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "is a text file"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "Invalid data"),
        (truncated, "moov|Invalid data"),
    ],
)
def test_what_is_no_clip_is_refused_with_its_reason(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "a.mp4"
    make(path)
    found = reason_of(path)
    assert any(part in found for part in reason.split("|")), found


def test_a_clip_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", smooth(30, 64, 80), movflags="faststart", g="6")
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    with pytest.raises(DecodeError):
        frames_of(path, range(30))


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode()])
    assert "holds no video" in reason_of(tmp_path / "a.mp4")


def test_damage_is_an_error_or_goes_unseen_but_never_crashes(tmp_path: Path) -> None:
    good = encode(tmp_path / "good.mp4", smooth(12, 64, 80), g="6").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(25):
        raw = bytearray(good)
        for at in random.integers(0, len(raw), random.integers(1, 20)):
            raw[at] = random.integers(0, 256)
        (tmp_path / "a.mp4").write_bytes(raw)
        try:
            frames_of(tmp_path / "a.mp4", decoder="pyav")
        except DecodeError:
            refused += 1
    assert refused >= 20


def test_an_unknown_decoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decoder 'opencv': expected auto, decord or pyav"):
        open_clip(tmp_path / "a.mp4", "opencv")


def test_a_request_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    with (
        open_clip(lossless(tmp_path / "a.mp4", smooth(2, 64, 80))) as reader,
        pytest.raises(DecodeError, match="more than 4,294,967,296"),
    ):
        reader.get([0] * 300_000)


# ------------------------------------------------------------------------------------------ images


def grey(low: int, high: int) -> np.ndarray:
    return np.linspace(low, high, 12 * 9).reshape(12, 9)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_an_image_is_a_clip_of_one_frame(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
    with open_clip(tmp_path / f"a.{suffix}") as reader:
        assert (reader.frame_count, reader.fps, reader.height, reader.width) == (1, 0.0, 12, 9)
        assert (reader.get([0, 0]) == pixels).all()


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(grey(0, 255).astype(np.uint8)),
        Image.fromarray(grey(0, 255).astype(np.uint8)).convert("P"),
        Image.fromarray(grey(0, 255).astype(np.uint8)).convert("LA"),
        Image.fromarray(grey(0, 65535).astype(np.uint16)),
    ],
    ids=["L", "P", "LA", "16-bit"],
)
def test_every_kind_of_grey_gives_the_same_rgb(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "a.png")
    found = frames_of(tmp_path / "a.png")[0].astype(int)
    assert np.abs(found - grey(0, 255)[..., None]).max() <= 1


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = frames_of(tmp_path / "a.png")[0]
    assert (found[:2] == 0).all()
    assert (found[2:] == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with open_clip(tmp_path / "a.png") as reader:
        assert (reader.height, reader.width) == (9, 12)
        assert (reader.get([0])[0] == np.rot90(pixels, 3)).all()


@pytest.mark.parametrize("orientation", [0, 1, 9, 200])
def test_orientations_that_exif_does_not_have_change_nothing(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert (frames_of(tmp_path / "a.png")[0] == pixels).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_title_in_another_encoding_harms_no_clip(tmp_path: Path, decoder: str) -> None:
    frames = smooth(5, 64, 80)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf#"
        stream: Any = container.add_stream("libx264rgb", rate=24, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 80, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"caf#", b"caf\xe9"))
    assert (frames_of(path, decoder=decoder) == frames).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_a_clip(tmp_path: Path, suffix: str) -> None:
    frames = [np.full((8, 8, 3), level, np.uint8) for level in (0, 80, 160, 255)]
    images = [Image.fromarray(f) for f in frames]
    images[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=images[1:], duration=50, lossless=True)
    with open_clip(tmp_path / f"a.{suffix}") as reader:
        assert reader.frame_count == 4
        assert reader.fps == pytest.approx(20)
        assert (reader.get([3, 1]) == np.stack([frames[3], frames[1]])).all()


def test_a_truncated_image_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(raw[: len(raw) // 2])
    assert "truncated" in reason_of(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(np.random.default_rng(0).bytes(500))
    assert "not a readable image" in reason_of(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n\x00" + b"x" * 100)
    assert "not a readable image" in reason_of(tmp_path / "c.png")
