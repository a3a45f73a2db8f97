"""Diagonal blocks as operators, and estimates of all blocks from the same probes."""

import pytest
import torch
from torch import nn

import twofold
from models import CASES, classification, mlp
from references import relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


def places(layout, names):
    parts = layout.as_dict(torch.arange(layout.size))
    return torch.cat([part.reshape(-1) for name, part in parts.items() if name in names])


@pytest.fixture
def curvature():
    case = classification(mlp(4, 5, 4, 3), sizes=(7, 3))
    return twofold.Curvature(case.model, case.loss_fn, case.batches)


OPERATORS = {
    "activation NME": lambda c: c.activation_nme,
    "sum": lambda c: 2 * c.hessian - c.nme / 3,
    "block": lambda c: c.hessian.block(["0.*", "2.*"]),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("params", ["0.weight", ["2.*", "0.bias"], "*.bias"], ids=["one", "several", "pattern"])
def test_a_block_is_the_slice_of_the_matrix(curvature, name, params):
    operator = OPERATORS[name](curvature)
    block = operator.block(params)
    index = places(operator.layout, block.layout.shapes)
    assert block.shape == (len(index), len(index))
    assert relative(block.to_dense(), operator.to_dense()[index][:, index]) < 1e-12
    v = torch.randn(len(index))
    named = block @ block.layout.as_dict(v)
    torch.testing.assert_close(block.layout.from_dict(named), block @ v)
    torch.testing.assert_close(block.T @ v, block @ v)


def test_parts_of_the_anatomy_have_blocks(curvature):
    case = classification(mlp(4, 5, 3))
    anatomy = twofold.anatomy(case.model, case.loss_fn, case.batches[0], num_matvecs=1)
    for part in (*anatomy.kinds.values(), *anatomy.modules.values(), anatomy.hessian):
        index = places(part.layout, ["0.weight", "2.bias"])
        expected = part.to_dense()[index][:, index]
        assert (part.block(["0.weight", "2.bias"]).to_dense() - expected).norm() < 1e-14, part.name


def test_blocks_share_the_dropout_masks_of_the_whole():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
    case = classification(model, sizes=(7, 3))
    hessian = twofold.Hessian(model, case.loss_fn, case.batches, mode="train")
    blocks = {name: hessian.block(name).to_dense() for name in hessian.layout.shapes}
    torch.randn(3)
    whole = hessian.to_dense()
    for name, block in blocks.items():
        index = places(hessian.layout, [name])
        assert relative(block, whole[index][:, index]) < 1e-12


def test_blocks_follow_the_parameters():
    case = classification(mlp(4, 5, 3))
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    block = hessian.block("0.*")
    before = block.to_dense()
    with torch.no_grad():
        case.model[2].weight.mul_(2)
    assert relative(block.to_dense(), before) > 1e-3
    assert relative(block.to_dense(), hessian.to_dense()[:25, :25]) < 1e-12


def test_either_name_of_a_tied_parameter_names_its_block():
    case = CASES["tied"]()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    first, second = hessian.block("embed.weight"), (hessian + hessian).block("head.*")
    assert list(second.layout.shapes) == ["embed.weight"]
    assert relative(second.to_dense(), 2 * first.to_dense()) < 1e-12


@pytest.mark.parametrize("params", ["3.*", ["0.*", "layer3.*"], []], ids=["one", "several", "none"])
def test_an_unknown_block_is_refused_with_what_exists(curvature, params):
    with pytest.raises(TwofoldError, match="0.weight, 0.bias" if params else "empty"):
        (2 * curvature.nme).block(params)


BLOCKS = {
    "parameter": [["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"], ["4.weight"], ["4.bias"]],
    "module": [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]],
    "patterns": [["0.weight", "2.weight", "4.weight"], ["0.bias"]],
    "named": [["0.weight", "0.bias", "2.weight", "2.bias"], ["4.weight", "4.bias"]],
}
ASKED = {"patterns": ["*.weight", "0.bias"], "named": {"body": ["0.*", "2.*"], "head": "4.*"}}


@pytest.mark.parametrize("name", BLOCKS)
def test_traces_and_row_norms_of_all_blocks_come_from_the_same_probes(curvature, name):
    traces = curvature.traces(200, by_block=ASKED.get(name, name))
    norms = curvature.frobenius(200, by_block=ASKED.get(name, name))
    for part, matrix in {p: getattr(curvature, p).to_dense() for p in traces}.items():
        assert len(traces[part]) == len(BLOCKS[name])
        for members, trace, norm in zip(BLOCKS[name], traces[part].values(), norms[part].values(), strict=True):
            index = places(curvature.layout, members)
            assert abs(trace.value - matrix[index, index].sum()) <= 4 * trace.stderr
            assert abs(norm.value - matrix[index].norm()) <= 4 * norm.stderr
    assert list(curvature.traces(2, by_block="module")["nme"]) == ["0", "2", "4"]
    assert list(curvature.traces(2, by_block={"body": ["0.*", "2.*"], "head": "4.*"})["nme"]) == ["body", "head"]


def test_blocks_add_up_to_the_whole(curvature):
    whole, blocks = curvature.traces(8), curvature.traces(8, by_block=True)
    rows, norms = curvature.frobenius(8, by_block=True), curvature.frobenius(8)
    for part in whole:
        assert sum(map(float, blocks[part].values())) == pytest.approx(whole[part].value, rel=1e-10)
        squares = sum(row.value**2 for row in rows[part].values())
        assert squares == pytest.approx(norms[part].value ** 2, rel=1e-10)


def test_block_norms_of_every_pair(curvature):
    found = curvature.block_norms(100, blocks="module", parts=("hessian", "activation_nme"))
    for part, norms in found.items():
        matrix = getattr(curvature, part).to_dense()
        assert norms.num_matvecs == 300
        assert torch.equal(norms.value, norms.value.T)
        for b, rows in zip(norms.blocks, BLOCKS["module"], strict=True):
            for c, columns in zip(norms.blocks, BLOCKS["module"], strict=True):
                expected = matrix[places(curvature.layout, rows)][:, places(curvature.layout, columns)].norm()
                estimate = norms[b, c]
                assert abs(estimate.value - expected) <= 4 * estimate.stderr + 1e-14, (part, b, c)
                assert estimate.stderr < 0.2 * estimate.value + 1e-14


def test_block_norms_of_single_entries_are_exact():
    model, x = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)), torch.randn(5, 1)
    c = twofold.Curvature(model, nn.MSELoss(), (x, torch.randn(5, 1)))
    norms = c.block_norms(2)["hessian"]
    torch.testing.assert_close(norms.value, c.hessian.to_dense().abs())
    assert norms.stderr.max() < 1e-14
    assert c.block_norms(1)["hessian"].stderr.isnan().all()


def test_modules_are_named_as_in_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.body = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))

        def forward(self, x):
            return self.scale * self.body(x)

    case = classification(Model())
    traces = twofold.Curvature(case.model, case.loss_fn, case.batches[0]).traces(1, by_block="module")
    assert list(traces["nme"]) == ["(model)", "body.0"]


@pytest.mark.parametrize(
    ("blocks", "text"),
    [("layers", "'layers' came"), ([], "came"), (3, "int came"), (["0.*", "x"], "'x' matches no"), ([3], "int came")],
    ids=["word", "nothing", "number", "unknown", "no pattern"],
)
def test_other_blocks_are_refused(curvature, blocks, text):
    with pytest.raises(TwofoldError, match=text):
        curvature.traces(1, by_block=blocks)
