import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.errors import TwofoldError
from twofold.lab.config import (
    OPTIMIZERS,
    REGULARIZERS,
    SCHEDULES,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RegularizerConfig,
    RunConfig,
    fashion_mnist,
    mnist1d,
)
from twofold.lab.data import AUGMENTATIONS, DATA_SETS
from twofold.lab.models import ACTIVATIONS, NORMS

counts = st.integers(1, 10**6)
seeds = st.integers(0, 2**40)
reals = st.floats(0, 1e6)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()

runs = st.builds(
    RunConfig,
    data=st.builds(
        DataConfig,
        name=st.sampled_from(list(DATA_SETS)),
        num_train=counts,
        num_validation=counts,
        num_test=st.none() | counts,
        label_noise=st.floats(0, 1),
        seed=seeds,
        pool=counts,
        augmentation=st.sampled_from(AUGMENTATIONS),
    ),
    model=st.builds(
        ModelConfig,
        name=st.sampled_from(["mlp", "conv"]),
        width=counts,
        depth=counts,
        activation=st.sampled_from(ACTIVATIONS),
        norm=st.sampled_from(NORMS),
        beta=st.floats(1e-6, 1e6),
    ),
    optimizer=st.builds(
        OptimizerConfig,
        name=st.sampled_from(OPTIMIZERS),
        lr=reals,
        momentum=st.floats(0.1, 1),
        nesterov=st.booleans(),
        weight_decay=reals,
    ),
    regularizer=st.just(RegularizerConfig())
    | st.builds(
        RegularizerConfig,
        name=st.sampled_from([name for name in REGULARIZERS if name not in ("none", "exact_trace")]),
        strength=reals,
        options=st.dictionaries(st.text(), plain, max_size=3),
        second_derivative=st.sampled_from([None, "0", "gaussian:100", "listing:0.5"]),
    ),
    epochs=st.integers(3, 1000),
    batch_size=counts,
    warmup_epochs=st.integers(0, 3),
    schedule=st.sampled_from(SCHEDULES),
    seed=seeds,
    curvature_every=st.integers(0, 10),
    track_every=st.integers(0, 10),
    curvature_probe=counts,
    curvature_matvecs=counts,
    max_steps=st.none() | counts,
    threads=st.integers(1, 64),
    device=st.sampled_from(["cpu", "cuda", "cuda:1"]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    channels_last=st.booleans(),
    compile=st.booleans(),
)


@given(runs)
def test_a_configuration_survives_json(config):
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert hash(again) == hash(config)
    assert config.label()


@pytest.mark.parametrize(
    ("kind", "field", "value", "told"),
    [
        (DataConfig, "name", "mnist", "mnist1d, fashion-mnist"),
        (DataConfig, "num_train", 0, "at least 1"),
        (DataConfig, "num_train", 10.0, "integer"),
        (DataConfig, "num_test", -1, "or None"),
        (DataConfig, "label_noise", 1.5, "at most 1"),
        (DataConfig, "seed", True, "integer"),
        (DataConfig, "augmentation", "cutout", "flip_crop"),
        (ModelConfig, "name", "resnext", "mlp, conv, wideresnet, resnet"),
        (ModelConfig, "activation", "Gelu", "beta_gelu"),
        (ModelConfig, "norm", None, "none, batch, layer"),
        (ModelConfig, "width", -3, "at least 1"),
        (ModelConfig, "beta", 0.0, "above 0"),
        (OptimizerConfig, "name", "adam", "sgd, adamw"),
        (OptimizerConfig, "lr", math.nan, "finite"),
        (OptimizerConfig, "lr", math.inf, "finite"),
        (OptimizerConfig, "momentum", -0.1, "at least 0"),
        (OptimizerConfig, "weight_decay", "1e-4", "finite number"),
        (OptimizerConfig, "nesterov", 1, "True or False"),
        (RegularizerConfig, "name", "SAM", "gradient_penalty"),
        (RegularizerConfig, "strength", -0.1, "at least 0"),
        (RegularizerConfig, "strength", math.nan, "finite"),
        (RegularizerConfig, "options", "p", "pairs"),
        (RegularizerConfig, "options", {"p": math.nan}, "finite numbers"),
        (RegularizerConfig, "options", {"params": ["a"]}, "text, finite numbers"),
        (RegularizerConfig, "second_derivative", "1", "gaussian:BETA"),
        (RegularizerConfig, "second_derivative", "gaussian:-1", "gaussian:BETA"),
        (RegularizerConfig, "second_derivative", 0, "gaussian:BETA"),
        (RegularizerConfig, "second_derivative", "listing:", "listing:BETA"),
        (RunConfig, "data", {"name": "mnist1d"}, "DataConfig"),
        (RunConfig, "epochs", 0, "at least 1"),
        (RunConfig, "batch_size", 0, "at least 1"),
        (RunConfig, "warmup_epochs", 26, "25 epochs"),
        (RunConfig, "schedule", "step", "cosine, constant"),
        (RunConfig, "max_steps", 0, "or None"),
        (RunConfig, "threads", 0, "at least 1"),
        (RunConfig, "device", "tpu", "cuda:N"),
        (RunConfig, "device", "cpu:foo", "cuda:N"),
        (RunConfig, "device", "cuda:-1", "cuda:N"),
        (RunConfig, "precision", "float16", "float32, bfloat16"),
        (RunConfig, "channels_last", 1, "True or False"),
        (RunConfig, "compile", "yes", "True or False"),
        (RunConfig, "ranks", 0, "at least 1"),
        (RunConfig, "ranks", 129, "128 examples"),
        (DataConfig, "image_size", 0, "or None"),
        (OptimizerConfig, "decay_norms", None, "True or False"),
    ],
)
def test_what_cannot_be_used_is_refused_by_field_and_value(kind, field, value, told):
    with pytest.raises(TwofoldError) as error:
        kind(**{field: value})
    for text in (f"{kind.__name__}.{field}", repr(value), told):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("none", "strength", 0.1),
        ("none", "options", {"p": 2}),
        ("none", "second_derivative", "0"),
        ("exact_trace", "second_derivative", "gaussian:2"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(name, field, value):
    with pytest.raises(TwofoldError, match=f"RegularizerConfig.{field}.*where name is '{name}'"):
        RegularizerConfig(name, **{field: value})


def test_a_wideresnet_has_a_depth_of_6n_plus_4():
    assert ModelConfig(name="wideresnet", depth=16).depth == 16
    with pytest.raises(TwofoldError, match="6n"):
        ModelConfig(name="wideresnet", depth=12)


def test_nesterov_needs_momentum():
    with pytest.raises(TwofoldError, match="momentum"):
        OptimizerConfig(momentum=0, nesterov=True)


def test_unknown_fields_are_refused_and_the_known_are_listed():
    with pytest.raises(TwofoldError, match=r"no field lr.*epochs.*seed"):
        RunConfig.from_dict({"lr": 0.1})
    with pytest.raises(TwofoldError, match=r"OptimizerConfig has no field rho.*weight_decay"):
        RunConfig.from_dict({"optimizer": {"rho": 0.1}})
    with pytest.raises(TwofoldError, match="mapping"):
        RunConfig.from_dict(["data"])
    with pytest.raises(TwofoldError, match="mapping"):
        RunConfig.from_dict({"data": 3})


def test_missing_fields_take_their_defaults():
    assert RunConfig.from_dict({"epochs": 3}) == replace(RunConfig(), epochs=3)


def test_equal_settings_are_equal_however_they_are_written():
    assert OptimizerConfig(lr=1) == OptimizerConfig(lr=1.0)
    whole, real = (
        RegularizerConfig("gradient_penalty", 0.1, {"p": p}, bell)
        for p, bell in ((1, "gaussian:2"), (1.0, "gaussian:2.0"))
    )
    assert whole == real
    assert whole.to_dict() == {**real.to_dict(), "options": {"p": 1}, "second_derivative": "gaussian:2"}
    assert RegularizerConfig("gradient_penalty", 0.1, (), "listing:0.25").second_derivative == "listing:0.25"
    assert RegularizerConfig(name="sam", options={"b": 1, "a": 2}) == RegularizerConfig(
        name="sam", options=(("a", 2), ("b", 1))
    )
    assert RegularizerConfig(strength=-0.0).to_dict() == RegularizerConfig().to_dict()


def test_recipes_are_the_settings_of_the_protocol():
    m1d, fm = mnist1d(), fashion_mnist()
    assert (m1d.data.num_train, m1d.data.num_validation, m1d.data.label_noise) == (4000, 500, 0.3)
    assert (m1d.model.name, m1d.model.width, m1d.model.depth, m1d.epochs) == ("mlp", 64, 4, 25)
    assert (fm.data.num_train, fm.data.num_validation, fm.data.label_noise, fm.data.pool) == (2000, 2000, 0.4, 2)
    assert (fm.model.name, fm.model.width, fm.model.depth, fm.epochs) == ("mlp", 100, 3, 40)
    for config in (m1d, fm):
        assert config.optimizer == OptimizerConfig("sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
        assert (config.batch_size, config.schedule, config.data.num_test) == (128, "cosine", None)


def test_every_field_shows_in_the_json():
    config = RunConfig()
    assert set(config.to_dict()) == {field.name for field in fields(config)}
    assert set(config.to_dict()["data"]) == {field.name for field in fields(config.data)}


def test_labels_tell_runs_apart():
    base = mnist1d()
    penalty = RegularizerConfig("gradient_penalty", 0.1, {"curvature": "nme"}, "gaussian:100")
    label = replace(base, regularizer=penalty, seed=103).label()
    for text in ("mnist1d", "mlp", "gelu", "gradient_penalty", "0.1", "curvature=nme", "gaussian:100", "103"):
        assert text in label


def test_every_rank_needs_an_example():
    with pytest.raises(TwofoldError, match="at most the 3 training examples"):
        RunConfig(data=DataConfig(num_train=3), ranks=4)
