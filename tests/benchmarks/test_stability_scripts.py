"""The explosion study: shocks, dtypes, the end of a run, and its rows."""

import math

import torch
from benchmarks.theory import stability_explosion as explosion


def batches(shocks, count):
    """The first `count` batches of a text in which no frequent byte occurs."""
    text, draw = torch.full((4096,), ord("~"), dtype=torch.uint8), torch.Generator().manual_seed(0)
    return torch.stack([explosion.batch_of(text, step, shocks, draw) for step in range(count)])


def test_bursts_are_one_frequent_byte_over_and_over_every_tenth_batch():
    found = batches("bursts", 20)
    hit = (found != ord("~")).flatten(1).any(1)
    assert hit.nonzero().flatten().tolist() == [9, 19]
    for row in found[[9, 19]].flatten(0, 1):
        tail = row[explosion.CONTEXT // 4 :]
        assert (tail == tail[0]).all()
        assert int(tail[0]) in explosion.FREQUENT
    assert len(found[[9, 19], :, -1].unique()) > 1, "every row has its own byte"


def test_frequent_bytes_are_half_of_every_batch():
    found = batches("everywhere", 20)
    share = (found != ord("~")).double().mean((1, 2))
    assert ((share > 0.4) & (share < 0.6)).all()
    assert set(found.unique().tolist()) == {*explosion.FREQUENT, ord("~")}
    assert (batches("no shocks", 20) == ord("~")).all()


def test_a_run_is_in_the_dtype_of_its_setting_and_within_its_bounds(monkeypatch):
    seen = set()
    network = explosion.DeepForCausalLM

    class Watched(network):
        def forward(self, *arguments, **named):
            seen.update(parameter.dtype for parameter in self.parameters())
            return super().forward(*arguments, **named)

    monkeypatch.setattr(explosion, "DeepForCausalLM", Watched)
    text = explosion.corpus()
    setting = explosion.Setting(0.1, "bursts", "bfloat16")
    _, bounded, end = explosion.run("bounded", setting, 0, 8, text)
    _, free, _ = explosion.run("unbounded", setting, 0, 8, text)
    assert seen == {torch.bfloat16}
    assert max(bounded) == 2.0
    assert max(free) > 76
    assert end is None


def test_a_run_ends_where_its_loss_diverges(monkeypatch):
    """NaN at once; worse than guessing only when it lasts, and never in the first steps."""
    worse = math.log(256) + 1

    def run(losses):
        network, left = explosion.DeepForCausalLM, iter(losses)

        class WithLosses(network):
            def forward(self, *arguments, **named):
                out = super().forward(*arguments, **named)
                out.loss = out.loss * 0 + next(left)
                return out

        with monkeypatch.context() as patch:
            patch.setattr(explosion, "DeepForCausalLM", WithLosses)
            setting = explosion.Setting(1e-3, "no shocks")
            return explosion.run("none", setting, 0, len(losses), explosion.corpus())[2]

    assert run([3.0, 3.0, math.nan, 3.0]) == 2
    assert run([worse] * 60 + [3.0] * 5) is None
    assert run([3.0] * 55 + [worse] * 19 + [3.0] * 5) is None
    assert run([3.0] * 55 + [worse] * 25) == 55


def test_rows_count_divergences_and_their_steps():
    runs = [([3.0] * 30, [0.1, 90.0], 12), ([2.0] * 30, [0.1, 5.0], None), ([math.nan], [1.0], 7)]
    setting = explosion.Setting(0.1, "bursts")
    found = {r["metric"]: r["value"] for r in explosion.rows_of("unbounded", setting, 30, runs)}
    assert found == {
        "diverged": 2,
        "runs": 3,
        "first divergence": 7,
        "last divergence": 12,
        "largest beta": 90.0,
        "last loss, median": 3.0,
    }
