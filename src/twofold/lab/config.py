"""What a run is: frozen, checked, and the same as JSON.

A recipe is a function that returns a RunConfig; a variant changes fields of it with `dataclasses.replace`.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from twofold.errors import TwofoldError
from twofold.lab.data import AUGMENTATIONS, DATA_SETS
from twofold.lab.models import ACTIVATIONS, MODELS, NORMS, RESNET_DEPTHS

OPTIMIZERS = ("sgd", "adamw")
REGULARIZERS = (
    "none",
    "sam",
    "usam",
    "asam",
    "wsam",
    "eigen_sam",
    "gsam",
    "friendly_sam",
    "look_sam",
    "gradient_penalty",
    "weight_noise",
    "hessian_trace",
    "gauss_newton_trace",
    "exact_trace",
)
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Config:
    """What all parts of a configuration share: checks that name the field, and the way to and from JSON."""

    def _refuse(self, name: str, came: Any, expected: str) -> TwofoldError:
        return TwofoldError(f"{type(self).__name__}.{name} is {came!r}; expected {expected}.")

    def _choice(self, name: str, known: Iterable[str]) -> None:
        came = getattr(self, name)
        if came not in tuple(known):
            raise self._refuse(name, came, "one of " + ", ".join(known))

    def _integer(self, name: str, low: int, optional: bool = False) -> None:
        came = getattr(self, name)
        if came is None and optional:
            return
        if isinstance(came, bool) or not isinstance(came, int) or came < low:
            raise self._refuse(name, came, f"an integer of at least {low}" + (" or None" if optional else ""))

    def _real(self, name: str, low: float = 0.0, high: float = math.inf, open_low: bool = False) -> None:
        """Check a finite number and store it as a float, so that 1 and 1.0 are the same run."""
        came = getattr(self, name)
        number = isinstance(came, int | float) and not isinstance(came, bool) and abs(came) <= sys.float_info.max
        if not number or came < low or came > high or (open_low and came == low):
            bound = f"above {low:g}" if open_low else f"of at least {low:g}"
            bound += "" if high == math.inf else f" and at most {high:g}"
            raise self._refuse(name, came, f"a finite number {bound}")
        object.__setattr__(self, name, float(came) + 0.0)  # + 0.0 turns -0.0 into 0.0

    def _flag(self, name: str) -> None:
        came = getattr(self, name)
        if not isinstance(came, bool):
            raise self._refuse(name, came, "True or False")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `from_dict` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s form; missing fields take their defaults.

        Raises:
            TwofoldError: a field is unknown, or its value cannot be used.
        """
        if not isinstance(values, Mapping):
            raise TwofoldError(f"{cls.__name__} is built from a mapping of its fields, not from {values!r}.")
        known = [f.name for f in fields(cls)]
        unknown = [str(name) for name in values if name not in known]
        if unknown:
            raise TwofoldError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}.")
        return cls(**values)


@dataclass(frozen=True)
class DataConfig(_Config):
    """Which data, how much of it, and how noisy its training labels are.

    Attributes:
        name: a data set of `twofold.lab.data`.
        num_train: training examples, drawn from the published training set.
        num_validation: validation examples with clean labels, disjoint from the training examples.
        num_test: test examples; None takes the whole published test set.
        label_noise: share of the training examples whose labels are drawn anew, uniformly over all classes.
        seed: picks the subset, the split and the label noise.
        pool: average pooling factor of images (2 makes 28x28 into 14x14).
        augmentation: what training images go through: "none", "flip_crop" (mirror; crop after padding by 4), or, for
            images that are read from files one by one, "random_resized_crop" (a random part, resized; mirror).
        image_size: side of the square that such images are brought to; None takes the data set's own (ImageNet: 224).
    """

    name: str = "mnist1d"
    num_train: int = 4000
    num_validation: int = 500
    num_test: int | None = None
    label_noise: float = 0.0
    seed: int = 0
    pool: int = 1
    augmentation: str = "none"
    image_size: int | None = None

    def __post_init__(self) -> None:
        self._choice("name", DATA_SETS)
        self._integer("num_train", 1)
        self._integer("num_validation", 1)
        self._integer("num_test", 1, optional=True)
        self._real("label_noise", high=1.0)
        self._integer("seed", 0)
        self._integer("pool", 1)
        self._choice("augmentation", AUGMENTATIONS)
        self._integer("image_size", 1, optional=True)


@dataclass(frozen=True)
class ModelConfig(_Config):
    """Which model, how large, and with which activation and normalisation.

    Attributes:
        name: "mlp", "conv", "wideresnet", "resnet" or "transformer".
        width: units of a hidden layer; channels of the conv net, of the transformer and of ResNet's first group (64 in
            the published one); the k of WideResNet-d-k.
        depth: hidden layers; convolutions; blocks of the transformer; 50, 101 or 152 of ResNet; the d of
            WideResNet-d-k (d = 6n + 4).
        activation: a name of `twofold.lab.models.ACTIVATIONS`.
        norm: "none", "batch" or "layer".
        beta: the beta of "beta_gelu"; other activations do not read it.
    """

    name: str = "mlp"
    width: int = 64
    depth: int = 4
    activation: str = "gelu"
    norm: str = "none"
    beta: float = 1.0

    def __post_init__(self) -> None:
        self._choice("name", MODELS)
        self._integer("width", 1)
        self._integer("depth", 1)
        self._choice("activation", ACTIVATIONS)
        self._choice("norm", NORMS)
        self._real("beta", open_low=True)
        if self.name == "wideresnet" and (self.depth < 10 or (self.depth - 4) % 6):
            raise self._refuse("depth", self.depth, "6n + 4 for a WideResNet: 10, 16, 22, 28, ...")
        if self.name == "resnet" and self.depth not in RESNET_DEPTHS:
            raise self._refuse("depth", self.depth, "one of " + ", ".join(map(str, RESNET_DEPTHS)) + " for a ResNet")


@dataclass(frozen=True)
class OptimizerConfig(_Config):
    """The base optimiser. AdamW does not read `momentum` and `nesterov`.

    Attributes:
        name: "sgd" or "adamw".
        lr: the highest learning rate; the schedule scales it.
        momentum, nesterov: as in `torch.optim.SGD`.
        weight_decay: its factor.
        decay_norms: whether the parameters of norms decay too.
    """

    name: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True

    def __post_init__(self) -> None:
        self._choice("name", OPTIMIZERS)
        self._real("lr")
        self._real("momentum", high=1.0)
        self._flag("nesterov")
        self._real("weight_decay")
        self._flag("decay_norms")
        if self.nesterov and self.momentum == 0:
            raise self._refuse("nesterov", True, "False where momentum is 0")


@dataclass(frozen=True)
class RegularizerConfig(_Config):
    """What stands in place of `loss.backward()`.

    Attributes:
        name: a regularizer, or "none".
        strength: rho of the sharpness methods, sigma of weight noise, or the factor of a trace.
        options: further arguments of the regularizer's constructor, as pairs or a mapping; kept sorted by name.
        second_derivative: phi'' of the activation while the regularizer works: None leaves it, "0" sets it to zero,
            "gaussian:BETA" puts beta / sqrt(2 pi) exp(-beta^2 x^2 / 2) in its place (2401.10809, eq. 19),
            "listing:BETA" the bell of that paper's listing (appendix C.2), beta / sqrt(2 pi) exp(-(beta x)^2).
    """

    name: str = "none"
    strength: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()
    second_derivative: str | None = None

    def __post_init__(self) -> None:
        self._choice("name", REGULARIZERS)
        self._real("strength")
        self._normalise_options()
        self._normalise_bell()
        if self.bell is not None and self.name in ("none", "exact_trace"):
            raise self._refuse("second_derivative", self.second_derivative, f"None where name is {self.name!r}")
        if self.name == "none":
            for name in ("strength", "options"):
                if came := getattr(self, name):
                    raise self._refuse(name, came, "nothing where name is 'none': plain training takes none")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the options as a mapping."""
        return {**super().to_dict(), "options": dict(self.options)}

    def _normalise_options(self) -> None:
        came = self.options
        try:
            options = dict(came)
        except (TypeError, ValueError):
            raise self._refuse("options", came, "(name, value) pairs") from None
        for name, value in options.items():
            plain = isinstance(value, str | int | float | bool | None)
            if not isinstance(name, str) or not plain or (isinstance(value, float) and not math.isfinite(value)):
                raise self._refuse("options", came, "names with text, finite numbers, True, False or None as values")
        # so that 1 and 1.0 are the same run
        whole = {n: int(v) for n, v in options.items() if isinstance(v, float) and v.is_integer() and abs(v) < 2**53}
        object.__setattr__(self, "options", tuple(sorted({**options, **whole}.items())))

    def _normalise_bell(self) -> None:
        """So that gaussian:2 and gaussian:2.0 are the same run."""
        if self.bell is not None and self.bell[0] != "0":
            kind, beta = self.bell
            object.__setattr__(self, "second_derivative", f"{kind}:{repr(beta).removesuffix('.0')}")

    @property
    def bell(self) -> tuple[str, float] | None:
        """Name and beta of what stands for phi''; ("0", 0.0) where it is zero, None where it is left alone."""
        came = self.second_derivative
        if came is None:
            return None
        if came == "0":
            return came, 0.0
        kind, _, text = came.partition(":") if isinstance(came, str) else ("", "", "")
        try:
            beta = float(text)
        except ValueError:
            beta = math.nan
        if kind not in ("gaussian", "listing") or not 0 < beta < math.inf:
            expected = 'None, "0", "gaussian:BETA" or "listing:BETA" with a positive BETA'
            raise self._refuse("second_derivative", came, expected)
        return kind, beta


@dataclass(frozen=True)
class RunConfig(_Config):
    """One training run: everything that decides its numbers, beside the versions of the code.

    Attributes:
        data, model, optimizer, regularizer: the parts.
        epochs: passes over the training examples.
        batch_size: examples a step, over all ranks; the last batch of an epoch may be smaller.
        warmup_epochs: epochs over which the learning rate rises linearly from 0.
        schedule: "cosine" (to 0 at the last step) or "constant", after the warm-up.
        seed: initialisation, shuffling, augmentation and the regularizer's noise.
        curvature_every: measure the curvature every so many epochs, see `train`; 0 never.
        fidelity_rho: measure there too how well rho C g^ predicts SAM's correction, with this rho; 0 does not.
        track_every: follow H, GN and NME with `twofold.track` every so many steps, into curvature.csv; 0 never.
        curvature_probe: training examples in the fixed batch that is measured.
        curvature_matvecs: matrix-vector products for each estimate.
        max_steps: stop (and end the schedule) here, even inside an epoch; None: after `epochs`.
        threads: torch threads; the last bits of a convolution depend on them.
        device: "cpu", "cuda" or "cuda:1".
        precision: of the passes of training and evaluation: "float32", or "bfloat16" by autocast; weights are float32.
        channels_last: keep images and convolutions' weights with channels innermost, which is faster on GPUs.
        compile: run the model through torch.compile; passes that are differentiated twice run as they are.
        ranks: processes that share every batch, each with its part; more than one are started by torchrun. BatchNorm
            sees a rank's part.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    epochs: int = 25
    batch_size: int = 128
    warmup_epochs: int = 0
    schedule: str = "cosine"
    seed: int = 100
    curvature_every: int = 0
    fidelity_rho: float = 0.0
    track_every: int = 0
    curvature_probe: int = 256
    curvature_matvecs: int = 16
    max_steps: int | None = None
    threads: int = 1
    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise self._refuse(name, getattr(self, name), f"a {kind.__name__}")
        for name in ("epochs", "batch_size", "curvature_probe", "curvature_matvecs", "threads", "ranks"):
            self._integer(name, 1)
        for name in ("warmup_epochs", "seed", "curvature_every", "track_every"):
            self._integer(name, 0)
        self._real("fidelity_rho")
        self._integer("max_steps", 1, optional=True)
        self._choice("schedule", SCHEDULES)
        self._choice("precision", PRECISIONS)
        self._flag("channels_last")
        self._flag("compile")
        if self.ranks > self.batch_size:
            raise self._refuse("ranks", self.ranks, f"at most the {self.batch_size} examples of a batch")
        if self.ranks > self.data.num_train:
            raise self._refuse("ranks", self.ranks, f"at most the {self.data.num_train} training examples")
        if self.fidelity_rho and not self.curvature_every:
            raise self._refuse(
                "fidelity_rho", self.fidelity_rho, "0 where curvature_every is 0: it says when to measure"
            )
        if self.warmup_epochs > self.epochs:
            raise self._refuse("warmup_epochs", self.warmup_epochs, f"at most the {self.epochs} epochs of the run")
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise self._refuse("device", self.device, '"cpu", "cuda" or "cuda:N"')

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the parts as mappings."""
        return {**super().to_dict(), **{name: getattr(self, name).to_dict() for name in _PARTS}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from `to_dict`'s form; missing fields take their defaults."""
        if isinstance(values, Mapping):
            values = {n: _PARTS[n].from_dict(v) if n in _PARTS else v for n, v in values.items()}
        return super().from_dict(values)

    def label(self) -> str:
        """Short text for people: data, model, regularizer, seed."""
        model, regularizer = self.model, self.regularizer
        activation = f"beta_gelu({model.beta:g})" if model.activation == "beta_gelu" else model.activation
        texts = [f"{name}={value}" for name, value in regularizer.options]
        if regularizer.second_derivative is not None:
            texts.append(f"phi''={regularizer.second_derivative}")
        penalty = "" if regularizer.name == "none" else f" {regularizer.strength:g}"
        extra = f" ({', '.join(texts)})" if texts else ""
        return f"{self.data.name} {model.name} {activation}, {regularizer.name}{penalty}{extra}, seed {self.seed}"


_PARTS: dict[str, Any] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "regularizer": RegularizerConfig,
}


def mnist1d() -> RunConfig:
    """MNIST-1D with 30 % label noise, MLP 40-64x4-10, 800 steps of SGD with cosine decay."""
    return RunConfig(
        data=DataConfig(name="mnist1d", num_train=4000, num_validation=500, label_noise=0.3),
        model=ModelConfig(name="mlp", width=64, depth=4, activation="gelu"),
        optimizer=OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4),
        epochs=25,
        batch_size=128,
    )


def fashion_mnist() -> RunConfig:
    """2000 Fashion-MNIST images of 14x14 with 40 % label noise, MLP 196-100x3-10, 40 epochs."""
    return replace(
        mnist1d(),
        data=DataConfig(name="fashion-mnist", num_train=2000, num_validation=2000, label_noise=0.4, pool=2),
        model=ModelConfig(name="mlp", width=100, depth=3, activation="gelu"),
        epochs=40,
    )


def transformer() -> RunConfig:
    """MNIST-1D on a transformer: 2 blocks of width 32 over 10 patches, AdamW with warm-up and cosine decay."""
    return replace(
        mnist1d(),
        model=ModelConfig(name="transformer", width=32, depth=2, activation="gelu", norm="layer"),
        optimizer=OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.05),
        warmup_epochs=2,
    )


def conv() -> RunConfig:
    """1000 examples of MNIST-1D with 30 % label noise, a conv net of 3 layers with BatchNorm, 400 steps of SGD."""
    recipe = mnist1d()
    return replace(
        recipe,
        data=replace(recipe.data, num_train=1000),
        model=ModelConfig(name="conv", width=16, depth=3, activation="gelu", norm="batch"),
        optimizer=replace(recipe.optimizer, lr=0.1),
        epochs=50,
    )
