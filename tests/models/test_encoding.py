"""Encoded once, the same bits alone or in company, from memory, from the cache or anew; any change is a miss."""

import dataclasses
import gc
import logging
import multiprocessing
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from clvr_train.data.cache import TensorCache
from clvr_train.data.images import reference_image, target_image
from clvr_train.method.trajectory import Sample, StoredImage
from clvr_train.method.truncation import truncate
from clvr_train.models import encoding
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.encoding import GROUP, Encoder, Memory, Picture
from clvr_train.models.klein import fingerprint, load_klein
from clvr_train.sft.dit import backward_flow_matching
from clvr_train.shapes.controller import make_trajectories

SHAPES = Path(__file__).resolve().parents[2] / "models" / "shapes" / "base"
SIZE = (96, 96)


def noise(seed, size=SIZE):
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def shapes_klein():
    return load_klein(SHAPES, expect="base", window=96, layers=(1, 2, 3))


@pytest.fixture(scope="module")
def shapes_samples():
    return [sample for trajectory in make_trajectories(3, seed=0, split="train") for sample in truncate(trajectory)]


def step(klein, samples, **options):
    """Loss and gradients of one step by a conditioner of its own, and what it had to encode."""
    conditioner = Conditioner(klein, SIZE, **options)
    klein.transformer.requires_grad_(True).zero_grad()
    seeds = [(0, *sample.key) for sample in samples]
    out = backward_flow_matching(conditioner, samples, seeds, text_dropout=0.2)
    gradients = [p.grad.clone() for p in klein.transformer.parameters()]
    klein.transformer.requires_grad_(False).zero_grad()
    return out.loss, gradients, (conditioner.text_calls, conditioner.image_calls)


def test_cached_and_uncached_steps_are_the_same_bit_for_bit(shapes_klein, shapes_samples, tmp_path):
    plain, gradients, calls = step(shapes_klein, shapes_samples)
    assert min(calls) > 3
    filling = step(shapes_klein, shapes_samples[::-1][:2], cache=TensorCache(tmp_path), cache_texts=True)
    Conditioner(shapes_klein, SIZE, cache=TensorCache(tmp_path), cache_texts=True).prime(shapes_samples)
    cached = step(shapes_klein, shapes_samples, cache=TensorCache(tmp_path), cache_texts=True)
    assert min(filling[2]) > 0 and cached[2] == (0, 0), "a cached step encodes nothing"
    assert cached[0] == plain and all(a.equal(b) for a, b in zip(cached[1], gradients, strict=True))
    images_only = step(shapes_klein, shapes_samples, cache=TensorCache(tmp_path), memory_gb=0)
    assert images_only[2][1] == 0 and images_only[2][0] >= calls[0] and images_only[0] == plain


def test_a_state_does_not_depend_on_its_company(shapes_klein):
    texts = ["", "a red circle", "a blue square left of a green triangle", "draw it . " * 9, "stop", "a square"]
    for size in (SIZE, (128, 64)):
        pictures = [Picture(noise(seed, size)) for seed in range(6)]
        alone = Encoder(shapes_klein, memory_gb=0)
        states = {text: alone.texts([text])[text] for text in texts}
        tokens = [alone.pictures([picture])[0] for picture in pictures]
        for order in ([5, 0, 3, 1, 4, 2], [2, 3], [1, 4, 0]):
            company = Encoder(shapes_klein)
            found = company.texts([texts[i] for i in order])
            assert all(found[texts[i]].equal(states[texts[i]]) for i in order)
            for i, found_tokens in zip(order, company.pictures([pictures[i] for i in order]), strict=True):
                assert found_tokens.equal(tokens[i])
            assert (company.text_calls, company.image_calls) == (len(order), len(order)), "copies are not counted"
    assert all(state.untyped_storage().nbytes() == state.nbytes for state in states.values()), "holds no neighbours"


def calls(encoder, image=None, text="a red circle", target_px=None):
    encoder.texts([text])
    encoder.pictures([Picture(image or noise(0), target_px)])
    return encoder.text_calls, encoder.image_calls


def encoder(klein, cache, **options):
    return Encoder(klein, cache=TensorCache(cache), cache_texts=True, **options)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def filled(tiny_klein, tmp_path):
    """(klein with a folder of its own, cache that holds one text and one image file, that file)."""
    klein = tiny_klein()
    shutil.copytree(klein.folder, tmp_path / "model")
    klein.folder = tmp_path / "model"
    file = tmp_path / "image.png"
    noise(0).save(file)
    assert calls(encoder(klein, tmp_path / "cache"), file) == (1, 1)
    assert calls(encoder(klein, tmp_path / "cache"), file) == (0, 0)
    return klein, tmp_path / "cache", file


def test_what_is_the_same_is_a_hit_wherever_it_lies(filled, tmp_path):
    klein, cache, file = filled
    moved = shutil.copy(file, tmp_path / "moved.png")
    stored = StoredImage("shard.tar:7:png", file.read_bytes)
    for image in (Path(moved), stored):
        assert calls(encoder(klein, cache), image) == (0, 0)
    assert calls(encoder(klein, cache), file, target_px=SIZE) == (0, 0), "an image of the size drawn is one entry"
    klein.folder = Path(shutil.copytree(klein.folder, tmp_path / "copy"))
    shutil.rmtree(klein.folder / "transformer")
    assert calls(encoder(klein, cache), file) == (0, 0), "the trained transformer plays no part"


def test_a_changed_byte_of_text_or_image_is_a_miss(filled):
    klein, cache, file = filled
    assert calls(encoder(klein, cache), file, text="a red circlf") == (1, 0)
    with file.open("ab") as appended:
        appended.write(b"\0")
    assert calls(encoder(klein, cache), file) == (0, 1)
    picture = noise(0)
    assert calls(encoder(klein, cache), picture) == (0, 1) and calls(encoder(klein, cache), picture) == (0, 0)
    picture.putpixel((5, 5), (1, 2, 3))
    assert calls(encoder(klein, cache), picture) == (0, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vae/diffusion_pytorch_model.safetensors", (0, 1)),
        ("vae/config.json", (0, 1)),
        ("text_encoder/model.safetensors", (1, 0)),
        ("tokenizer/tokenizer.json", (1, 0)),
        ("tokenizer/chat_template.jinja", (1, 0)),
        ("transformer/diffusion_pytorch_model.safetensors", (0, 0)),
    ],
)
def test_a_changed_byte_of_an_encoder_is_a_miss(filled, name, expected):
    klein, cache, file = filled
    flip(klein.folder / name)
    assert calls(encoder(klein, cache), file) == expected


@pytest.mark.parametrize(
    ("constant", "expected"), [("PREPROCESSING_VERSION", (0, 1)), ("ENCODING_VERSION", (1, 1)), ("GROUP", (0, 0))]
)
def test_another_version_is_a_miss(filled, monkeypatch, constant, expected):
    klein, cache, file = filled
    monkeypatch.setattr(encoding, constant, getattr(encoding, constant) + 1)
    assert calls(encoder(klein, cache), file) == expected


def test_another_dtype_size_window_or_choice_of_layers_is_a_miss(filled):
    klein, cache, file = filled
    assert calls(encoder(dataclasses.replace(klein, window=47), cache), file) == (1, 0)
    assert calls(encoder(dataclasses.replace(klein, layers=(2, 1, 3)), cache), file) == (1, 0)
    assert calls(encoder(klein, cache), file, target_px=(64, 96)) == (0, 1)
    assert calls(encoder(klein, cache), file, target_px=(96, 64)) == (0, 1)
    klein.vae.to(torch.bfloat16)
    assert calls(encoder(klein, cache), file) == (0, 1)
    klein.transformer.to(torch.bfloat16)
    assert calls(encoder(klein, cache), file) == (1, 0)


def test_damage_is_encoded_anew(filled):
    klein, cache, file = filled
    for path in cache.glob("??/??/*"):
        flip(path)
    assert calls(encoder(klein, cache), file) == (1, 1) and calls(encoder(klein, cache), file) == (0, 0)


def test_an_image_that_changes_under_way_is_kept_under_its_own_hash(filled, tmp_path):
    klein, cache, _ = filled
    contents = []
    for seed in (7, 8):
        noise(seed).save(tmp_path / "other.png")
        contents.append((tmp_path / "other.png").read_bytes())
    read = iter([contents[0], *[contents[1]] * 9])  # the first read is the header's
    encoder(klein, cache).pictures([Picture(StoredImage("a", lambda: next(read)))])
    for content, expected in zip(contents, (1, 0), strict=True):
        again = encoder(klein, cache)
        again.pictures([Picture(StoredImage("b", lambda content=content: content))])
        assert again.image_calls == expected


def fill(klein, cache, samples, go):
    torch.set_num_threads(1)
    conditioner = Conditioner(klein, SIZE, cache=TensorCache(cache), cache_texts=True)
    go.wait()
    conditioner.prime(samples)


def test_two_processes_fill_one_cache_at_once(tiny_klein, tmp_path):
    klein = tiny_klein()
    samples = [Sample(f"{n}", 2, f"a {n}", ("draw it",), (noise(n),), noise(n + 1)) for n in range(10)]
    fork = multiprocessing.get_context("fork")
    go = fork.Event()
    orders = samples, samples[::-1]
    workers = [fork.Process(target=fill, args=(klein, tmp_path, order, go)) for order in orders]
    for worker in workers:
        worker.start()
    go.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not list((tmp_path / "tmp").iterdir()) and len(list(tmp_path.glob("??/??/*"))) == 11 + 11
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads differ in their last bits
    try:
        cached, _, encoded = step(klein, samples, cache=TensorCache(tmp_path), cache_texts=True)
        assert encoded == (0, 0) and cached == step(klein, samples)[0]
    finally:
        torch.set_num_threads(before)


def test_the_size_is_stated_before_anything_is_written(tiny_klein, tmp_path, caplog, monkeypatch):
    samples = [Sample(f"{n}", 2, f"a {n}", ("draw it",), (noise(n),), noise(n + 1)) for n in range(5)]
    conditioner = Conditioner(tiny_klein(), SIZE, cache=TensorCache(tmp_path), cache_texts=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 100_000))
    stated = "6 texts of 18.4 kB and 6 images of up to 1.15 kB: 147 kB to write,"
    with pytest.raises(OSError, match=f"{stated} 100 kB free; free space, choose another folder"):
        conditioner.prime(samples)
    assert not list(tmp_path.glob("??")) and (conditioner.text_calls, conditioner.image_calls) == (0, 0)
    monkeypatch.undo()
    seen = []
    with caplog.at_level(logging.INFO):
        conditioner.prime(samples, progress=lambda work: seen.append(len(work)) or work)
    assert f"{tmp_path}: {stated} " in caplog.text
    written = sum(path.stat().st_size for path in tmp_path.glob("??/??/*"))
    assert 0.8 * 147_456 < written <= 147_456 and seen == [2 * -(-6 // GROUP)]
    caplog.clear()
    conditioner.prime(samples)
    assert not caplog.messages and (conditioner.text_calls, conditioner.image_calls) == (6, 6)


def test_what_goes_into_a_cache_is_shared_out(tiny_klein, tmp_path):
    """Two that meet at a barrier, as the ranks of a training do, once all have listed what is missing."""
    samples = [Sample(f"{n}", 2, f"a {n}", ("draw it",), (noise(n),), noise(n + 1)) for n in range(9)]
    ranks = [Conditioner(tiny_klein(), SIZE, cache=TensorCache(tmp_path), cache_texts=True) for _ in range(2)]
    barrier = threading.Barrier(2)

    def prime(rank):
        def share(work):
            barrier.wait(60)
            return work[rank::2]

        ranks[rank].prime(samples, share=share)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prime, range(2)))
    calls = [(conditioner.text_calls, conditioner.image_calls) for conditioner in ranks]
    assert [sum(kind) for kind in zip(*calls, strict=True)] == [10, 10] and all(min(pair) > 0 for pair in calls)
    third = Conditioner(tiny_klein(), SIZE, cache=TensorCache(tmp_path), cache_texts=True)
    third.batch(samples)
    assert (third.text_calls, third.image_calls) == (0, 0)


def test_memory_holds_bytes_and_forgets_the_oldest(tiny_klein, caplog):
    memory = Memory(100)
    for name, size in (("a", 40), ("b", 40), ("a", 20), ("c", 50), ("d", 101)):
        memory.put((name,), name, size)
    assert [memory.get((name,)) for name in "abcd"] == ["a", None, "c", None] and memory.used_bytes == 70
    samples = [Sample(f"{n}", 1, f"a {n}", ("draw it",), (), noise(n)) for n in range(5)]
    small = Conditioner(tiny_klein(), SIZE, memory_gb=60e-6)
    small.prime(samples)
    assert (small.text_calls, small.image_calls) == (0, 0) and "takes 116 kB, memory holds 60 kB" in caplog.text
    five = [f"a {n}" for n in range(5)]
    for texts, encoded in (five[1:2], 1), (five[1:2], 1), (five, 5), (five, 7):  # three states are held
        assert small.text(texts).shape[0] == len(texts)
        assert small.text_calls == encoded and small.encoder.memory.used_bytes <= 60_000


def test_tokens_of_a_decoded_image_go_when_it_does(tiny_klein):
    encoder, image = Encoder(tiny_klein()), noise(0)
    for _ in range(2):
        encoder.pictures([Picture(image), Picture(image, (64, 64))])
    assert encoder.image_calls == 2 and encoder.memory.used_bytes == (9 + 4) * 32 * 4
    del image
    gc.collect()
    assert encoder.memory.used_bytes == 0


def test_an_image_of_the_size_drawn_is_the_same_as_target_and_as_reference():
    image = noise(1, (64, 160))
    assert reference_image(image, 32).tobytes() == image.tobytes() == target_image(image, (64, 160)).tobytes()


def test_fingerprint_is_of_names_and_contents(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match="vae: no files of the model"):
        fingerprint(tmp_path, ("vae",))
    (tmp_path / "vae" / "a").write_text("1")
    first = fingerprint(tmp_path, ("vae",))
    (tmp_path / "vae" / "a").rename(tmp_path / "vae" / "b")
    assert fingerprint(tmp_path, ("vae",)) != first
