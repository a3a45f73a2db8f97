"""Blocks of parameters: how they are named, and what samples say of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.batches import describe
from twofold.curvature.kinds import ROOT
from twofold.errors import TwofoldError
from twofold.parameters import ParameterLayout
from twofold.types import BlockNorms

Blocks: TypeAlias = Literal["parameter", "module"] | Sequence[str] | Mapping[str, str | Sequence[str]]
"""One block for each parameter, one for each module, one for each pattern, or {block: patterns}."""


class Partition:
    """Blocks of the vector theta [P].

    Args:
        layout: where the parameters lie.
        blocks: "parameter" (or True), "module" (its own parameters, not those of modules inside it), names or glob
            patterns with one block each, or {name: patterns}. Blocks may overlap and need not cover everything.

    Attributes:
        members: {block: names of its parameters}.

    Raises:
        TwofoldError: another form, or a pattern that matches nothing.
    """

    def __init__(self, layout: ParameterLayout, blocks: Blocks | bool) -> None:
        self.members: dict[str, list[str]] = {}
        if blocks is True or blocks == "parameter":
            self.members = {name: [name] for name in layout.shapes}
        elif blocks == "module":
            for name in layout.shapes:
                self.members.setdefault(_module_of(name), []).append(name)
        elif isinstance(blocks, str) or not isinstance(blocks, Mapping | Sequence) or not blocks:
            raise TwofoldError(
                'blocks are "parameter", "module", a list of names or glob patterns, or {name: patterns}; '
                f"{repr(blocks) if isinstance(blocks, str) else describe(blocks)} came."
            )
        else:
            patterns = blocks if isinstance(blocks, Mapping) else {str(pattern): pattern for pattern in blocks}
            self.members = {name: layout.choose(chosen) for name, chosen in patterns.items()}
        self._layout = layout

    def sums(self, entries: Float[Tensor, "P"]) -> Float[Tensor, "blocks"]:
        """Sum the entries of each block, in float64 on the CPU."""
        of = {name: part.sum(dtype=torch.float64) for name, part in self._layout.as_dict(entries).items()}
        return torch.stack([torch.stack([of[name] for name in names]).sum() for names in self.members.values()]).cpu()

    def restricted(self, vector: Float[Tensor, "P"], block: str) -> Float[Tensor, "P"]:
        """The vector with zeros outside a block."""
        result = torch.zeros_like(vector)
        given, places = self._layout.as_dict(vector), self._layout.as_dict(result)
        for name in self.members[block]:
            places[name].copy_(given[name])
        return result

    def norms(self, squares: Float[Tensor, "probes blocks blocks"]) -> BlockNorms:
        """The roots of the mean of samples, their errors by the delta method."""
        value = squares.mean(0).sqrt()
        spread = squares.std(0) if len(squares) > 1 else torch.full_like(value, math.nan)
        stderr = spread / math.sqrt(len(squares)) / torch.where(value > 0, 2 * value, 1.0)
        return BlockNorms(tuple(self.members), value, stderr, len(squares) * len(value))


def _module_of(parameter: str) -> str:
    """The module that a parameter belongs to; of a parametrised one (weight_norm), the module that is parametrised."""
    path = f".{parameter}"
    of = path.partition(".parametrizations.")[0] if ".parametrizations." in path else path.rpartition(".")[0]
    return of.removeprefix(".") or ROOT
