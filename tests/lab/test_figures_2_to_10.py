import pytest

from lab.synthetic import noise, table_of
from twofold.lab.figures import find_figure, style
from twofold.lab.figures.scales import find_scale

QUICK = find_scale("quick")
NUMBERS = (2, 3, 4, 5, 10)


def verdicts_of(number, accuracy, scale=QUICK):
    figure = find_figure(number)
    return {v.finding: v for v in figure.verdicts(table_of(figure, scale, accuracy), scale)}


def is_psam(config, activation):
    return config.model.activation == activation and config.regularizer.name == "gradient_penalty"


def phi_zero(config):
    return config.regularizer.second_derivative == "0"


def synthetic(config):
    return str(config.regularizer.second_derivative).startswith("gaussian")


def gauss_newton(config):
    return dict(config.regularizer.options).get("curvature") == "gauss_newton"


VARIANTS = {2: ("gelu", phi_zero, -1), 3: ("relu", synthetic, 1), 10: ("gelu", gauss_newton, -1)}
"""Figure: activation, what marks the variant, and whether the paper finds it better or worse than PSAM's own H."""


@pytest.mark.parametrize("number", VARIANTS)
@pytest.mark.parametrize(("effect", "expected"), [(4.0, "shows"), (-4.0, "opposite"), (0.0, "does not show")])
def test_variants_of_psam_in_test_accuracy(number, effect, expected):
    activation, is_variant, sign = VARIANTS[number]

    def accuracy(config, split):
        changed = is_psam(config, activation) and is_variant(config)
        return 60.0 + noise(config) + (sign * effect if changed and split != "train" else 0.0)

    found = verdicts_of(number, accuracy)
    judged = [v for text, v in found.items() if "test accuracy" in text]
    assert len(judged) == 3
    assert {v.verdict for v in judged} == {expected}
    assert all(v.effect == pytest.approx(effect, abs=0.5) for v in judged)


@pytest.mark.parametrize("number", VARIANTS)
@pytest.mark.parametrize(
    ("better", "worse", "expected"), [(1.0, 6.0, "shows"), (6.0, 1.0, "opposite"), (3.0, -3.0, "does not show")]
)
def test_variants_of_psam_in_distance_from_sam(number, better, worse, expected):
    activation, is_variant, sign = VARIANTS[number]

    def accuracy(config, split):
        if split != "train" or not is_psam(config, activation):
            return 60.0 + noise(config)
        variant = is_variant(config)
        return 60.0 + noise(config) + (better if variant == (sign > 0) else worse)

    (judged,) = [v for text, v in verdicts_of(number, accuracy).items() if "distance" in text]
    assert judged.verdict == expected
    # the difference of two distances is a distance again where both lie on one side
    assert judged.effect == pytest.approx(abs(worse) - abs(better), abs=0.5)


@pytest.mark.parametrize("number", VARIANTS)
def test_ranges_of_rho_are_judged_apart(number):
    activation, is_variant, sign = VARIANTS[number]

    def accuracy(config, split):
        small = config.regularizer.strength < 0.15
        changed = is_psam(config, activation) and is_variant(config)
        return 60.0 + noise(config) + (sign * (4.0 if small else -4.0) if changed else 0.0)

    found = verdicts_of(number, accuracy)
    assert [v.verdict for text, v in found.items() if "up to 0.15" in text] == ["shows"]
    assert [v.verdict for text, v in found.items() if "above 0.15" in text] == ["opposite"]


def test_gelu_without_second_derivative_like_relu():
    def like(values):
        def accuracy(config, split):
            kind = "without" if phi_zero(config) else config.model.activation
            start = 10.0 if config.model.activation == "relu" else 0.0  # a start apart is no difference
            return 60.0 + start + noise(config) + (values[kind] if is_psam(config, config.model.activation) else 0.0)

        (verdict,) = [v for text, v in verdicts_of(2, accuracy).items() if "behaves like ReLU" in text]
        return verdict.verdict

    assert like({"gelu": 8.0, "relu": 2.0, "without": 2.5}) == "shows"
    assert like({"gelu": 2.5, "relu": 2.0, "without": 8.0}) == "opposite"
    assert like({"gelu": 4.0, "relu": 2.0, "without": 0.0}) == "does not show"


@pytest.mark.parametrize("number", [2, 3, 4, 5, 10])
def test_numbers_hold_every_point_once(number):
    figure = find_figure(number)
    table = table_of(figure, QUICK, lambda config, split: 60.0 + noise(config))
    numbers = figure.numbers(table)
    keys = ["data", "curve", numbers.columns[2]]
    assert not numbers.duplicated(keys).any()
    sgd = numbers[numbers[keys[2]] == 0]
    assert set(sgd["curve"]) == set(numbers["curve"])
    # plain SGD is shared by all curves of an activation; every other run belongs to one curve
    runs = numbers.loc[numbers[keys[2]] > 0, "seeds"].sum() + len(QUICK.seeds) * table["model.activation"].nunique()
    assert number == 5 or runs == len(table)


@pytest.mark.parametrize("number", NUMBERS)
def test_files_are_the_same_byte_for_byte(number):
    figure = find_figure(number)
    table = table_of(figure, QUICK, lambda config, split: 60.0 + noise(config))

    def files():
        with style.applied():
            drawing = figure.draw(table, 3)
            return style.to_svg(drawing), style.to_png(drawing)

    first = files()
    assert first == files()
    assert b"<path" in first[0]
