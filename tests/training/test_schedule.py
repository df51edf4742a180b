import pytest

from rwkv_peft.training.schedule import learning_rate, weight_decay


def test_cos_falls_from_the_first_rate_to_the_last() -> None:
    def rate(step: int, warmup: int = 0) -> float:
        return learning_rate(
            step, total=101, schedule="cos", lr_init=1.0, lr_final=0.1, warmup_steps=warmup
        )

    assert rate(0) == 1.0
    assert rate(50) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)
    assert rate(0, warmup=10) == pytest.approx(0.01)
    assert rate(5, warmup=10) == pytest.approx(rate(5) * 0.505)
    assert rate(10, warmup=10) == rate(10)


def test_wsd_is_stable_and_falls_over_the_last_fifth() -> None:
    rates = [
        learning_rate(s, total=101, schedule="wsd", lr_init=1.0, lr_final=0.0, warmup_steps=0)
        for s in range(101)
    ]
    assert rates[:81] == [1.0] * 81
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_weight_decay_goes_from_first_to_last_geometrically() -> None:
    values = [weight_decay(s, total=3, first=0.1, last=0.001) for s in range(3)]
    assert values == pytest.approx([0.1, 0.01, 0.001])
    assert [weight_decay(s, total=3, first=0.1, last=-1) for s in range(3)] == [0.1] * 3
