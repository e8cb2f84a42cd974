"""Training targets against the schedulers that invert them, and the seeds that resume needs."""

import hashlib

import numpy as np
import pytest
import torch

from complexity_dit.config import ObjectiveConfig
from complexity_dit.models.transformer import MIN_NOISE, velocity_towards
from complexity_dit.seeding import SEEDING, derive_seed, generator_for
from complexity_dit.training.objective import (
    build_scheduler,
    drop_labels,
    noisy_input_and_target,
    sample_times,
    training_loss,
)
from inl_core.run.errors import UserError


def batch():
    torch.manual_seed(0)
    return torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.05, 0.3, 0.6, 0.95])


def test_the_flow_goes_from_image_to_noise():
    clean, noise, _ = batch()
    config = ObjectiveConfig()
    at_zero, _, target = noisy_input_and_target(clean, noise, torch.zeros(4), config)
    at_one, steps, _ = noisy_input_and_target(clean, noise, torch.ones(4), config)
    assert torch.equal(at_zero, clean)
    assert torch.equal(at_one, noise)
    assert torch.equal(target, noise - clean)
    assert steps.tolist() == [1000.0] * 4


def perfect_prediction(kind, x, t, clean, noise, scheduler):
    """The prediction of a network that knows the clean image."""
    if kind == "flow":
        return noise - clean
    signal = scheduler.alphas_cumprod[int(t)]
    epsilon = (x - signal.sqrt() * clean) / (1 - signal).sqrt()
    if kind == "epsilon":
        return epsilon
    return signal.sqrt() * epsilon - (1 - signal).sqrt() * clean


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_the_scheduler_inverts_the_objective(kind):
    clean, noise, times = batch()
    config = ObjectiveConfig(prediction_type=kind)
    scheduler = build_scheduler(config)
    if kind != "flow":  # the training target is that same perfect answer
        x, steps, target = noisy_input_and_target(clean, noise, times, config)
        for i, t in enumerate(steps):
            expected = perfect_prediction(kind, x[i], t, clean[i], noise[i], scheduler)
            torch.testing.assert_close(target[i], expected, rtol=1e-4, atol=1e-5)
    scheduler.set_timesteps(20)
    x = noise
    for t in scheduler.timesteps:
        prediction = perfect_prediction(kind, x, t, clean, noise, scheduler)
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    # DDIM's last step ends at the first alpha of the schedule, a ten-thousandth short of the image.
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5 if kind == "flow" else 0.05)


def test_times_follow_their_distribution():
    draw = generator_for(0, "test")
    normal = sample_times(20000, ObjectiveConfig(shift=1.0), draw)
    assert 0 < normal.min() < normal.max() < 1
    assert torch.logit(normal).mean().abs() < 0.03
    assert torch.logit(normal).std() == pytest.approx(1, abs=0.03)
    uniform = sample_times(20000, ObjectiveConfig(time_sampling="uniform", shift=1.0), draw)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.005)
    shifted = sample_times(20000, ObjectiveConfig(time_sampling="uniform", shift=3.0), draw)
    assert shifted.median() == pytest.approx(0.75, abs=0.02)  # 3 * 0.5 / (1 + 2 * 0.5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_density_of_noise_levels_follows_the_objective_unless_named(kind):
    flow = ObjectiveConfig().resolved()
    assert (flow.time_sampling, flow.shift) == ("logit_normal", 2.0)
    config = ObjectiveConfig(prediction_type=kind)
    times = sample_times(20000, config, generator_for(0, "test"))
    assert times.mean() == pytest.approx(0.5, abs=0.01)
    assert times.var() == pytest.approx(1 / 12, abs=0.005)
    named = ObjectiveConfig(prediction_type=kind, time_sampling="logit_normal", shift=2.0)
    assert named.resolved() == named
    assert sample_times(20000, named, generator_for(0, "test")).mean() > 0.6
    assert config.resolved({"time_sampling": "logit_normal", "shift": 2.0}) == named
    assert config.resolved({"time_sampling": 3, "shift": "a"}) == config.resolved()


def test_the_velocity_towards_the_clean_image_is_the_target():
    clean, noise, times = batch()
    noisy, timestep, target = noisy_input_and_target(clean, noise, times, ObjectiveConfig())
    torch.testing.assert_close(velocity_towards(clean, noisy, timestep), target)


def test_times_stay_where_the_velocity_is_not_divided_by_almost_zero():
    clean, _, _ = batch()
    off = velocity_towards(clean + 0.01, clean, torch.zeros(4))
    torch.testing.assert_close(off, torch.full_like(off, -0.01 / MIN_NOISE), rtol=1e-3, atol=0)
    early = {"logit_mean": -20.0, "shift": 1.0}
    least = sample_times(100, ObjectiveConfig(**early), generator_for(0, "test")).min()
    assert least == pytest.approx(MIN_NOISE)
    free = ObjectiveConfig(network_output="target", **early)
    assert sample_times(100, free, generator_for(0, "test")).max() < 1e-6


def test_only_flow_can_predict_the_clean_image():
    assert ObjectiveConfig().writes_sample
    assert not ObjectiveConfig(network_output="target").writes_sample
    assert not ObjectiveConfig(prediction_type="epsilon").writes_sample
    with pytest.raises(UserError, match="network_output target"):
        ObjectiveConfig(prediction_type="epsilon", network_output="sample")


def test_labels_are_dropped_field_by_field():
    labels = torch.ones(20000, 2, dtype=torch.long)
    dropped = drop_labels(labels, [0.1, 0.1], generator_for(0, "test")) == -1
    assert dropped.float().mean(0).tolist() == pytest.approx([0.1, 0.1], abs=0.01)
    assert dropped.all(1).float().mean() == pytest.approx(0.01, abs=0.004)
    assert torch.equal(drop_labels(labels, [0.0, 0.0], generator_for(0, "test")), labels)


def test_seeds_depend_on_all_their_arguments_and_nothing_else():
    seeds = {
        derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "b", 1),
        derive_seed(0, "a", 2), derive_seed(0, "a", 1, 0),
    }  # fmt: skip
    assert len(seeds) == 5
    assert derive_seed(0, "a", 1) in seeds
    first = torch.rand(3, generator=generator_for(7, "x", 2))
    torch.rand(100)
    assert torch.equal(first, torch.rand(3, generator=generator_for(7, "x", 2)))


def first_words(count, version):
    """The first 64 bits that the generators of many positions draw."""
    draws = [
        torch.randint(2**63 - 1, (1,), generator=generator_for(0, "sample", i, version=version))
        for i in range(count)
    ]
    return torch.cat(draws)


def test_no_two_of_100_000_positions_share_their_numbers():
    assert len(first_words(100_000, SEEDING).unique()) == 100_000


def test_version_1_had_32_bits_and_keeps_its_numbers():
    for version, equal in ((1, True), (2, False)):
        pair = [generator_for(0, "sample", i, version=version) for i in (27560, 45449)]
        assert torch.equal(*(torch.rand(4, generator=draw) for draw in pair)) == equal


def test_the_numbers_of_a_position_never_change():
    first = torch.randint(2**32, (3,), generator=generator_for(0, "sample", 0))
    assert first.tolist() == [4132023990, 1272343490, 3314399097]
    # The state is that of numpy's Mersenne Twister with the same words.
    other = np.random.MT19937()
    words = hashlib.shake_256(b"sample,0,0").digest(4 * 624)
    other.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.frombuffer(words, "<u4"), "pos": 624},
    }
    assert first.tolist() == other.random_raw(6)[1::2].tolist()


def test_each_field_can_have_its_own_dropout():
    config = ObjectiveConfig(label_dropout={"genre": 0.5, "style": 0.1})
    rates = config.label_dropouts(["style", "genre"])
    assert rates == [0.1, 0.5]  # in the order of the fields, not of the mapping
    labels = torch.ones(20000, 2, dtype=torch.long)
    dropped = drop_labels(labels, rates, generator_for(0, "test")) == -1
    assert dropped.float().mean(0).tolist() == pytest.approx([0.1, 0.5], abs=0.01)
    assert ObjectiveConfig(label_dropout=0.2).label_dropouts(["a", "b"]) == [0.2, 0.2]
    for wrong in ({"style": 0.1}, {"style": 0.1, "genre": 0.1, "artist": 0.1}):
        with pytest.raises(UserError, match="fields of the data are style, genre"):
            ObjectiveConfig(label_dropout=wrong).label_dropouts(["style", "genre"])


def test_the_loss_is_the_mean_square_in_the_dtype_of_the_target():
    target = torch.randn(2, 3, 4, 4)
    prediction = torch.randn(2, 3, 4, 4).bfloat16()
    loss = training_loss(prediction, target)
    assert torch.equal(loss, (prediction.float() - target).square().mean())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_dropout_all": 1.5}, "label_dropout_all is 1.5"),
        ({"label_dropout": 1.5}, "label_dropout: 1.5 must be a probability"),
        ({"label_dropout": {"style": -0.1}}, "label_dropout of style: -0.1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        ObjectiveConfig(**settings)
