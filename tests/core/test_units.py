import pytest

from mmpeft.core import units


@pytest.mark.parametrize(
    ("seconds", "want"),
    [(0.4211, "0.42 s"), (9.97, "10 s"), (38.4, "38 s"), (59.7, "1 min 0 s"), (312, "5 min 12 s"), (7654, "2 h 7 min")],
)
def test_durations(seconds, want):
    assert units.duration(seconds) == want


@pytest.mark.parametrize(
    ("amount", "want"),
    [(512, "512 B"), (2_000_000, "1.91 MiB"), (2_480_000_000, "2.31 GiB"), (85_899_345_920, "80.0 GiB")],
)
def test_sizes(amount, want):
    assert units.size(amount) == want


@pytest.mark.parametrize(
    ("number", "want"),
    [
        (0, "0"),
        (950, "950"),
        (12300, "12,300"),
        (1_240_000, "1.24 M"),
        (134_515_008, "135 M"),
        (7_620_000_000, "7.62 B"),
    ],
)
def test_counts(number, want):
    assert units.count(number) == want


def test_shares_and_rates():
    assert units.percent(0.9225) == "92.2 %"
    assert units.percent(1) == "100.0 %"
    assert [units.rate(value) for value in (0.0342, 1.5, 11.24, 1320.4)] == ["0.0342", "1.50", "11.2", "1,320"]
    assert [units.scientific(value) for value in (1e-3, 2e-5, 1e-4, None)] == ["0.001", "2e-5", "0.0001", "-"]


def test_what_is_absent_is_said():
    for function in (units.duration, units.size, units.count, units.percent, units.rate):
        assert function(None) == "not recorded"
