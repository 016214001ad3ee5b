"""What only a GPU can show. `make gpu` runs these; `SPEECHLAB_REHEARSE=1` tries them on the CPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from same_codes import assert_same_codes
from test_recipes import RECIPES, tiny

from speechlab import load
from speechlab.foundations.audio_files import save_wav
from speechlab.foundations.batches import pad_last
from speechlab.foundations.columns import codes_column, with_column
from speechlab.foundations.contracts import mask_of
from speechlab.foundations.machine import Stamp
from speechlab.foundations.outside_judges import load_recognizer, load_speaker_encoder
from speechlab.foundations.sampling import Sampling
from speechlab.lm.generation import generate
from speechlab.lm.gpt import GPT, GPTConfig
from speechlab.metis.acoustic import write_codes
from speechlab.metis.decoding import PRESETS
from speechlab.metis.masked_lm import go_on
from speechlab.tokenizer import files
from speechlab.tokenizer.precision import at_precision
from speechlab.tokenizer.speech_tokenizer import CONFIGS, SpeechTokenizer
from speechlab.tokenizer.streaming import TokenizerStream

pytestmark = pytest.mark.cuda
REHEARSE = os.environ.get("SPEECHLAB_REHEARSE") == "1"
CODECS = ("speechtokenizer-small", "encodec-small", "small-causal")


@pytest.fixture(scope="module")
def device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not REHEARSE:
        pytest.skip("needs a CUDA GPU")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def exact(device):
    """TF32 would move codes: float32 means float32 here."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def use(monkeypatch, device) -> None:
    """Let the next training use this device; accelerate keeps the first one of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("SPEECHLAB_DEVICE", str(device))


def small_codec(name: str) -> SpeechTokenizer:
    torch.manual_seed(0)
    return SpeechTokenizer(CONFIGS[name]).eval()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_three_steps(name, compiled, device, tmp_path, monkeypatch):
    if compiled and REHEARSE:
        pytest.skip("compiling on the CPU takes minutes")
    use(monkeypatch, device)
    loop = replace(RECIPES[name].loop, steps=3, log_every=1, precision="bf16", compile=compiled)
    model, history = tiny(name, loop=loop).train(tmp_path)
    assert len(history) == 3
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_of_the_cpu_goes_on_here(name, device, tmp_path, monkeypatch):
    loop = replace(RECIPES[name].loop, steps=4, log_every=1, save_every=2)
    recipe = tiny(name, loop=loop)
    use(monkeypatch, "cpu")
    recipe.train(tmp_path / "a", until=2)
    use(monkeypatch, device)
    _, history = recipe.train(tmp_path / "a")
    use(monkeypatch, "cpu")
    _, wanted = recipe.train(tmp_path / "b")
    assert [row["step"] for row in history] == [row["step"] for row in wanted]
    for row, other in zip(history, wanted):
        for key in row.keys() & other.keys() - {"seconds", "seconds_per_step"}:
            if isinstance(row[key], float):
                assert row[key] == pytest.approx(other[key], rel=0.05, abs=0.05), key


@pytest.mark.parametrize("name", CODECS)
def test_codes_are_those_of_the_cpu(name, device, corpus):
    here, there = load(name), load(name).to(device)
    for u in corpus[:6]:
        assert_same_codes(here, u.wav, there.encode(u.wav.to(device)).cpu())
    codes = here.encode(corpus[0].wav)
    sound = there.decode(codes.to(device)).cpu()
    torch.testing.assert_close(sound, here.decode(codes), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["seanet-small", "small", "small-causal"])
def test_a_batch_is_its_rows(name, device, corpus):
    model = small_codec(name).to(device)
    rows = [corpus[i].wav.to(device) for i in range(5)]
    wav, sizes = pad_last([row[0] for row in rows])
    codes = model.encode(wav, None, mask_of(sizes, wav.shape[-1]).to(device))
    for row, mine in zip(rows, codes):
        alone = model.encode(row)[0]
        assert (mine[:, : alone.shape[1]] == alone).float().mean() > 0.99
        assert (mine[:, alone.shape[1] :] == -1).all()


def test_streams(device, corpus):
    model = load("small-causal").to(device)
    wav = corpus[0].wav.to(device)
    stream, state, back, sound = TokenizerStream(model), None, None, []
    for piece in wav.split(5 * 320, dim=-1):
        codes, state = stream.encode(piece, state)
        heard, back = stream.decode(codes, back)
        sound.append(heard)
    sound = torch.cat(sound, dim=-1)
    whole = model.decode(model.encode(wav[..., : sound.shape[-1]]))
    torch.testing.assert_close(sound, whole, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["hybrid-small", "gpt-small"])
def test_generation(name, device):
    model = load(name).to(device)
    extra = {"tokenizer": load("small-causal").to(device)} if name == "hybrid-small" else {}
    found = generate(model, None, 12, Sampling(top_p=0.9), seed=0, **extra)
    again = generate(model, None, 12, Sampling(top_p=0.9), seed=0, **extra)
    assert torch.equal(found.codes[0].cpu(), again.codes[0].cpu())


def test_greedy_generation_is_that_of_the_cpu(device):
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    prompts = torch.randint(256, (3, 1, 9))
    here = generate(model, prompts, 20, Sampling(temperature=0), min_frames=20)
    there = generate(model.to(device), prompts, 20, Sampling(temperature=0), min_frames=20)
    same = [float((a == b.cpu()).float().mean()) for a, b in zip(here.codes, there.codes)]
    assert sum(same) / 3 > 0.9  # a tie may send a row elsewhere


def test_columns_and_folders(device, corpus, tmp_path, monkeypatch):
    use(monkeypatch, device)
    here, there = load(CODECS[0]), load(CODECS[0]).to(device)
    part = corpus[:6]
    coded = with_column(part, codes_column(there), tmp_path / "columns")
    for i, u in enumerate(part):
        assert_same_codes(here, u.wav, coded.columns["codes"].cut(u.id)[None])
        save_wav(tmp_path / "in" / f"{i}.wav", u.wav, 16000)
    report = files.encode_folder(CODECS[0], tmp_path / "in", tmp_path / "out")
    assert (report.done, report.failed) == (6, {})
    assert files.decode_folder(None, tmp_path / "out", tmp_path / "back").done == 6


def test_fewer_bits(device, corpus):
    model = load(CODECS[0]).to(device)
    wav = corpus[0].wav.to(device)
    same = (at_precision(model, "bf16").encode(wav) == model.encode(wav))[0, 0].float().mean()
    assert same > 0.9


def test_judges(device, corpus):
    wav = corpus[0].wav
    one, other = load_recognizer(), load_recognizer().to(device)
    torch.testing.assert_close(other(wav.to(device)).cpu(), one(wav), atol=1e-2, rtol=0)
    one, other = load_speaker_encoder(), load_speaker_encoder().to(device)
    torch.testing.assert_close(other(wav.to(device)).cpu(), one(wav), atol=1e-3, rtol=0)


def test_a_stamp_waits_and_names_the_device(device):
    size = 4000 if device.type == "cuda" else 200
    a = torch.randn(size, size, device=device)
    a @ a
    with Stamp("queued", device) as stamp:
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    with Stamp("waited", device) as after:
        a.sum().item()
    assert stamp.seconds > after.seconds  # the work is in the first, not in who asks next
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu ("
    assert name in str(stamp)


def test_metis_writes_what_it_writes_on_the_cpu(device):
    """Both stages, from shipped weights; a tie between scores may fall either way."""
    prompt, said = torch.randint(512, (40,)), torch.randint(256, (8, 40))
    writer, acoustic = load("metis-small"), load("metis-acoustic-small")
    rule, steps = PRESETS["metis"], (8, 4, 2, 1, 1, 1, 1, 1)
    here = go_on(writer, [prompt], 40, rule, 8)[0]
    there = go_on(writer.to(device), [prompt], 40, rule, 8)[0].cpu()
    assert (here == there).float().mean() > 0.9
    both = torch.cat([prompt, here])
    codes = write_codes(acoustic, [both], [said], rule, steps)[0]
    again = write_codes(acoustic.to(device), [both], [said], rule, steps)[0].cpu()
    assert (codes == again).float().mean() > 0.8
