"""Distillation losses against float64 loops; teachers, units, caches; where gradients go."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from speechlab.foundations.batches import SegmentBatches, make_batch
from speechlab.foundations.columns import with_column
from speechlab.foundations.recipes import Optim
from speechlab.foundations.training import TrainConfig
from speechlab.tokenizer.distillation import Distiller, d_axis_loss, pseudo_label_loss, t_axis_loss
from speechlab.tokenizer.rvq import ResidualVQ, RVQConfig
from speechlab.tokenizer.teacher_training import FinetuneRecipe, HubertRecipe
from speechlab.tokenizer.teachers import (
    MFCC,
    HubertPretraining,
    Teacher,
    Units,
    change_speed,
    frame_geometry,
    match_frames,
    pad_for_frames,
    span_mask,
    teacher_column,
    tiny_hubert,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("masked", [False, True])
def test_d_axis_matches_float64_loops(masked):
    """Eq. 2: one cosine over time for each dimension."""
    student, teacher = noise(2, 7, 5), noise(2, 7, 5, seed=1)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) > 0.3
    total = 0.0
    for b in range(2):
        keep = mask[b].numpy() if masked else np.ones(7, bool)
        for d in range(5):
            a, s = (x[b, :, d].double().numpy()[keep] for x in (student, teacher))
            cosine = float(a @ s / (np.linalg.norm(a) * np.linalg.norm(s)))
            total -= log_sigmoid(cosine) / 5 / 2
    found = d_axis_loss(student, teacher, mask if masked else None)
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_d_axis_constants_of_the_paper():
    x = noise(3, 50, 16)
    assert float(d_axis_loss(x, x)) == pytest.approx(0.3133, abs=1e-4)
    assert float(d_axis_loss(noise(3, 5000, 16), noise(3, 5000, 16, seed=1))) == pytest.approx(
        0.6931, abs=5e-3
    )


def test_t_axis_matches_float64_loops():
    student, teacher = noise(2, 4, 6), noise(2, 4, 6, seed=1)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    total = count = 0
    for b in range(2):
        for t in range(4):
            if mask[b, t]:
                a, s = (x[b, t].double().numpy() for x in (student, teacher))
                cosine = float(a @ s / (np.linalg.norm(a) * np.linalg.norm(s)))
                total, count = total - log_sigmoid(cosine) + 0.5 * np.abs(a - s).mean(), count + 1
    found = t_axis_loss(student, teacher, mask, l1_weight=0.5)
    assert float(found) == pytest.approx(total / count, rel=1e-5)


def test_pseudo_labels_match_float64_loops():
    """Eq. 3."""
    scores, units = noise(2, 5, 9), torch.randint(9, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    total = count = 0
    for b in range(2):
        for t in range(5):
            if mask[b, t]:
                row = scores[b, t].double().numpy()
                total += math.log(np.exp(row).sum()) - row[int(units[b, t])]
                count += 1
    assert float(pseudo_label_loss(scores, units, mask)) == pytest.approx(total / count, rel=1e-5)


@given(seed=st.integers(0, 500), fill=st.floats(-1e4, 1e4))
def test_masked_frames_do_not_matter(seed, fill):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 9, generator=generator) > 0.4
    mask[:, 0] = True
    student, teacher = noise(2, 9, 4, seed=seed), noise(2, 9, 4, seed=seed + 1)
    other = torch.where(mask[..., None], student, torch.tensor(fill))
    for loss in (d_axis_loss, t_axis_loss):
        assert torch.isclose(loss(other, teacher, mask), loss(student, teacher, mask), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: d_axis_loss(torch.zeros(1, 4, 3), torch.zeros(1, 5, 3)), "student has shape"),
        (lambda: t_axis_loss(torch.zeros(4, 3), torch.zeros(4, 3)), "student has shape"),
        (lambda: d_axis_loss(*[torch.zeros(1, 4, 3)] * 2, torch.ones(1, 4)), "mask is"),
        (lambda: pseudo_label_loss(torch.zeros(1, 4, 3), torch.full((1, 4), 3)), "units has"),
        (lambda: pseudo_label_loss(torch.zeros(1, 4, 3), torch.zeros(1, 5).long()), "units has"),
        (lambda: match_frames(torch.zeros(1, 0, 3), 4, 320, 320), "features has"),
        (lambda: match_frames(torch.zeros(4, 3), 4, 320, 320), "features has"),
        (lambda: Teacher(tiny_hubert(16, 1), layer=2), "layer is 2"),
        (lambda: Teacher(tiny_hubert(16, 1), layer="mean"), "layer is 'mean'"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_distillation_reaches_z_through_level_1_only():
    """The gradient at z is that of the loss at q1, passed straight; no other codebook matters."""
    torch.manual_seed(0)
    rvq = ResidualVQ(RVQConfig(dim=6, n_q=4, codebook_size=16, kmeans_iterations=0)).eval()
    z, teacher = noise(2, 6, 20).requires_grad_(True), noise(2, 20, 6, seed=1)
    out = rvq(z)
    at_z, at_sum = torch.autograd.grad(
        d_axis_loss(out.first.transpose(1, 2), teacher), (z, out.quantized), allow_unused=True
    )
    assert at_sum is None
    q1 = rvq.decode(out.codes[:, :1]).requires_grad_(True)
    (wanted,) = torch.autograd.grad(d_axis_loss(q1.transpose(1, 2), teacher), q1)
    torch.testing.assert_close(at_z, wanted)
    assert wanted.norm() > 0
    for level in rvq.levels[1:]:  # change the others: nothing happens
        level.embed.normal_()
    (again,) = torch.autograd.grad(d_axis_loss(rvq(z).first.transpose(1, 2), teacher), z)
    assert torch.equal(at_z, again)
    rvq.levels[0].embed.mul_(-1)  # change the first: it does
    (different,) = torch.autograd.grad(d_axis_loss(rvq(z).first.transpose(1, 2), teacher), z)
    assert not torch.allclose(at_z, different)


def test_commitment_reaches_z_through_every_level():
    """Leave a level out of the sum, and the gradient changes: each contributes."""
    torch.manual_seed(0)
    rvq = ResidualVQ(RVQConfig(dim=6, n_q=4, codebook_size=16, kmeans_iterations=0)).eval()
    z = noise(2, 6, 20).requires_grad_(True)
    parts, residual = [], z
    out = rvq(z)
    for index, level in enumerate(rvq.levels):
        vectors = level.vectors(out.codes[:, index]).transpose(1, 2)
        loss = (residual - vectors).pow(2).mean()
        parts.append(torch.autograd.grad(loss, z, retain_graph=True)[0])
        residual = residual - vectors
    assert all(part.norm() > 0 for part in parts)
    (whole,) = torch.autograd.grad(out.commit_loss, z)
    torch.testing.assert_close(whole, sum(parts))


@given(samples=st.integers(1, 9000))
def test_windows_are_centred_on_the_frames(samples):
    """Output t of a network with HuBERT's window sees samples around 320 t + 160."""
    wav = torch.zeros(1, 1, samples)
    frames = -(-samples // 320)
    padded = pad_for_frames(wav, 320, 400)
    assert (padded.shape[-1] - 400) // 320 + 1 == frames
    assert padded.shape[-1] == (frames - 1) * 320 + 400
    wav[..., samples // 2] = 1
    place = int(pad_for_frames(wav, 320, 400).argmax()) - 40
    assert place == samples // 2


@given(
    frames=st.integers(1, 40),
    wanted=st.integers(1, 90),
    rate=st.sampled_from([160.0, 320.0, 240.0, 1280 / 3]),
)
def test_matched_frames_interpolate_time(frames, wanted, rate):
    """A feature that is the time of its frame gives, anywhere inside, the time asked for."""
    times = (torch.arange(frames) + 0.5) * rate
    found = match_frames(times.view(1, -1, 1), wanted, rate, 320.0)[0, :, 0]
    middles = (torch.arange(wanted) + 0.5) * 320
    inside = (middles >= times[0]) & (middles <= times[-1])
    torch.testing.assert_close(found[inside], middles[inside], rtol=1e-4, atol=1e-2)
    assert (found[middles > times[-1]] == times[-1]).all()


def small_model(kind: str):
    """A random model of each supported kind, a few thousand parameters."""
    common = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    convolutions = {
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    }
    if kind == "hubert":
        return transformers.HubertModel(transformers.HubertConfig(**common, **convolutions))
    if kind == "wavlm":
        return transformers.WavLMModel(transformers.WavLMConfig(**common, **convolutions))
    return transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**common))


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "w2v-bert"])
def test_any_transformers_model_is_a_teacher(tmp_path, kind, corpus):
    torch.manual_seed(0)
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    if kind == "w2v-bert":
        transformers.SeamlessM4TFeatureExtractor().save_pretrained(tmp_path)
    if kind == "wavlm":
        transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    wav = corpus[0].wav
    one, two, mean = (Teacher.load(tmp_path, layer) for layer in (1, 2, "average"))
    assert mean(wav).shape == (1, -(-wav.shape[-1] // 320), 16)
    torch.testing.assert_close(mean(wav), (one(wav) + two(wav)) / 2, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one(wav), two(wav))
    slow = Teacher.load(tmp_path, 1, hop_length=640)
    assert slow(wav).shape[1] == -(-wav.shape[-1] // 640)
    if kind == "wavlm":  # normalised input: loudness does not matter
        torch.testing.assert_close(one(wav), one(0.5 * wav), atol=1e-3, rtol=1e-3)


def test_the_teachers_frames_are_where_they_should_be():
    """A click moves the features of the frame it is in, and of that frame most."""
    torch.manual_seed(0)
    hubert = tiny_hubert(16, 1).eval()
    assert frame_geometry(hubert)[0] == 320
    wav = 1e-3 * noise(1, 1, 16000)
    for frame in (3, 25, 49):
        click = wav.clone()
        click[..., 320 * frame + 160] += 0.9
        pads = [pad_for_frames(w, *frame_geometry(hubert)) for w in (wav, click)]
        with torch.no_grad():
            change = [hubert.feature_extractor(p) for p in pads]
        moved = (change[0] - change[1]).abs().sum(dim=1)[0]
        assert int(moved.argmax()) == frame


def test_hidden_frames_are_invisible():
    torch.manual_seed(0)
    hubert = tiny_hubert(16, 1).eval()
    game = HubertPretraining(hubert, 5).eval()
    wav, units = 0.1 * noise(1, 1, 16000), torch.randint(5, (1, 50))
    hidden = torch.zeros(1, 50, dtype=torch.bool)
    hidden[0, 20:30] = True
    game.visible_weight = 0.0
    valid = torch.ones_like(hidden)
    louder = wav.clone()
    louder[..., 23 * 320 : 27 * 320] *= 5
    with torch.no_grad():
        assert torch.isclose(
            game(wav, units, hidden, valid)[0], game(louder, units, hidden, valid)[0], atol=1e-5
        )
        nothing = torch.zeros_like(hidden)
        nothing[0, 0] = True
        game.visible_weight = 1.0
        assert not torch.isclose(
            game(wav, units, nothing, valid)[0], game(louder, units, nothing, valid)[0], atol=1e-5
        )


def test_span_masks():
    torch.manual_seed(0)
    hidden = span_mask(200, 300, 0.05, 7)
    share = float(hidden[:, 20:].float().mean())
    assert share == pytest.approx(1 - 0.95**7, abs=0.02)
    assert span_mask(3, 4, 0.0, 10).any(dim=1).all()


class Counted(Teacher):
    """A teacher that counts how often it is asked."""

    asked = 0

    def forward(self, wav):
        type(self).asked += 1
        return super().forward(wav)


def test_features_are_computed_once_and_cut_by_frame(tmp_path, corpus):
    part = corpus[:6]
    teacher = Counted.untrained(width=16, layers=2)
    found = with_column(part, teacher_column(teacher), tmp_path)
    assert Counted.asked == 6  # one utterance at a time: padding cannot leak in
    values = found.columns["teacher"]
    wanted = teacher(part[2].wav)[0]
    torch.testing.assert_close(values.cut(part[2].id).T, wanted, atol=2e-2, rtol=1e-2)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    before, asked = (place / "values.bin").stat().st_mtime_ns, Counted.asked
    again = with_column(part, teacher_column(teacher), tmp_path).columns["teacher"]
    assert (place / "values.bin").stat().st_mtime_ns == before
    assert Counted.asked == asked  # not made again
    assert torch.equal(again.cut(part[2].id), values.cut(part[2].id))
    with_column(part, teacher_column(Counted.untrained(seed=1, width=16, layers=2)), tmp_path)
    assert Counted.asked == asked + 6  # other weights, other file
    with_column(part, teacher_column(Counted(teacher.model, layer=1)), tmp_path)
    assert Counted.asked == asked + 12  # another layer of the same weights: another file
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3
    batch = SegmentBatches(found, 1.0, 4, multiple=320)[3]
    features, mask = batch["teacher"], batch.valid("teacher")
    assert features.shape == (4, 16, 50)
    for row, (name, start) in enumerate(zip(batch.ids, batch.starts)):
        assert start % 320 == 0
        whole = values.cut(name)[:, start // 320 :][:, :50]
        assert torch.equal(features[row, :, : whole.shape[1]], whole)
        assert mask[row].sum() == whole.shape[1]
    with pytest.raises(ValueError, match="multiple of 320"):
        make_batch(found, [(0, batch.starts[0] + 1, batch.starts[0] + 3201)])


def test_units_name_the_nearest_centre(corpus):
    units = Units.fit(MFCC(), corpus[:4], 8)
    wav = corpus[0].wav
    rows = ((MFCC()(wav)[0] - units.mean) / units.scale).double()
    slow = [int(((row - units.centres.double()) ** 2).sum(dim=1).argmin()) for row in rows]
    assert units(wav)[0].tolist() == slow
    state = torch.get_rng_state()
    again = Units.fit(MFCC(), corpus[:4], 8)
    assert torch.equal(again.centres, units.centres)  # seeded
    assert torch.equal(state, torch.get_rng_state())  # and nobody else's draws moved


@pytest.mark.parametrize("kind", ["d_axis", "t_axis", "pseudo_label"])
def test_distiller(corpus, kind):
    part = with_column(corpus[:6], teacher_column(Teacher.untrained(width=16, layers=1)), "")
    distiller = Distiller(part, kind, clusters=5)
    assert distiller.size == (5 if kind == "pseudo_label" else 16)
    batch = SegmentBatches(part, 0.5, 4, multiple=320)[0]
    semantic = noise(4, 25, distiller.size).requires_grad_(True)
    loss = distiller(semantic, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert semantic.grad.abs().sum() > 0
    features, mask = batch["teacher"].transpose(1, 2), batch.valid("teacher")
    if kind == "pseudo_label":
        wanted = pseudo_label_loss(semantic, distiller.units.number(features), mask)
    else:  # standardised by the corpus's own mean and deviation
        rows = torch.cat([part.columns["teacher"].cut(e.id).T for e in part.entries])
        features = (features - rows.mean(dim=0)) / rows.std(dim=0)
        wanted = {"d_axis": d_axis_loss, "t_axis": t_axis_loss}[kind](semantic, features, mask)
    torch.testing.assert_close(loss, wanted)
    again = Distiller(part, kind, clusters=5)
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), distiller.buffers()))  # seeded
    with pytest.raises(ValueError, match="kind is 'both'"):
        Distiller(part, "both")
    with pytest.raises(ValueError, match="no column 'teacher'"):
        Distiller(corpus[:6], kind)


def test_pretraining_learns_and_resumes(tmp_path, corpus):
    recipe = HubertRecipe(
        optim=Optim(2e-3, 1, betas=(0.9, 0.98)), loop=TrainConfig(12, log_every=3),
        batch_size=4, clusters=8, seconds=1.0, width=16, layers=1,
    )  # fmt: skip
    one, history = recipe.train(tmp_path / "a", corpus)
    assert history[-1]["loss"] < 1.5 * 1.2 * math.log(8) * 1.2
    assert history[-1]["loss"] < history[0]["loss"]
    two, again = recipe.train(tmp_path / "a", corpus)  # finished: nothing to do
    assert again == history
    recipe.train(tmp_path / "b", corpus, until=5)
    three, _ = recipe.train(tmp_path / "b", corpus)  # in two parts
    for other in (two, three):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_finetuning_learns_and_leaves_its_start_alone(tmp_path, corpus):
    Teacher.untrained(seed=3, width=16, layers=1).model.save_pretrained(tmp_path / "start")
    stored = (tmp_path / "start" / "model.safetensors").read_bytes()
    recipe = FinetuneRecipe(
        optim=Optim(5e-3, 3), loop=TrainConfig(30, log_every=25), batch_size=4,
        start=str(tmp_path / "start"),
    )  # fmt: skip
    tuned, history = recipe.train(tmp_path / "run", corpus)
    assert history[-1]["loss"] < history[0]["loss"]
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == stored
    before = Teacher.load(tmp_path / "start").model.state_dict()
    assert before.keys() == tuned.state_dict().keys()
    assert any(not torch.equal(before[k], v) for k, v in tuned.state_dict().items())
    slow = replace(recipe, optim=Optim(1e-9, 0), loop=TrainConfig(1))  # hardly a step
    near, _ = slow.train(tmp_path / "near", corpus)  # what is tuned began as the start
    for key, value in near.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)


@given(factor=st.floats(0.7, 1.4), samples=st.integers(1600, 9000))
def test_labels_follow_their_sounds_when_the_speed_changes(factor, samples):
    """A wave that holds its own frame number: after the change, labels and sound still agree."""
    numbers = torch.arange(samples) // 320
    wav = (numbers / 100).view(1, 1, -1)
    labels = torch.arange(-(-samples // 320))[None]
    moved, followed = change_speed(wav, labels, factor)
    assert abs(moved.shape[-1] - samples / factor) <= 1
    assert followed.shape[1] == -(-moved.shape[-1] // 320)
    for frame in range(moved.shape[-1] // 320):
        heard = float(moved[0, 0, frame * 320 + 160]) * 100
        assert abs(heard - float(followed[0, frame])) <= 1.01
    same, kept = change_speed(wav, labels, 1.0)
    assert torch.equal(same, wav)
    assert torch.equal(kept, labels)
