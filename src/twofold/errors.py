"""What twofold raises and warns: what came, what was expected, what to do.

Texts that several places need, or that are longer than a line, stand here once.
"""


class TwofoldError(ValueError):
    """Something that twofold was given cannot be used as it is; the message says what to do."""


class NotFiniteError(TwofoldError):
    """The loss or a product is NaN or infinite: curvature is not defined here."""


class TwofoldWarning(UserWarning):
    """What the caller should know: a result may not mean what was hoped, or something was left out or done anew."""


NOT_A_BATCH = """\
{came} is not a batch.
A batch is a pair (inputs, targets), or a mapping with "labels". Inputs may be a tensor (the model is called as
model(x)), a tuple or list (model(*x)) or a mapping (model(**x)). For any other form pass
forward=f with f(model, batch) -> (outputs, targets)."""

ONE_SHOT = """\
data is {came}, which can be read only once; a curvature matrix reads its data once for every product.
Pass list(loader), or an object whose __iter__ starts anew each time (a DataLoader with shuffle=False)."""

SHUFFLING = """\
data is a DataLoader that shuffles ({sampler}): each product would see other batches.
Pass list(loader) to fix the batches, or build the loader with shuffle=False."""

EMPTY_DATA = """\
data holds no batch: {came} yielded nothing. A curvature matrix needs at least one batch (inputs, targets)."""

DATA_CHANGED = """\
Batch {index} of data changed between two readings: a curvature matrix reads its data several times and needs the same
values each time. What is random in a data set must draw from torch's, NumPy's or Python's global generator (twofold
replays these), a sampler must keep its order. Or read it once: pass list(loader)."""

NOT_DETERMINISTIC = """\
The loss of {where} changed between two forward passes at the same parameters: {culprit}.
A curvature matrix runs its batches several times. Random numbers must come from torch's, NumPy's or Python's global
generator, which twofold replays; switch other noise off, or measure with mode="eval"."""

SPLITTING_MIXES = """\
microbatches={count} would change the loss: {reason}. Leave microbatches out, measure with mode="eval" if that is what
mixes the examples, or say with weight= how many terms a batch's loss averages."""

RANKS_DIFFER = """\
The {what} differ between the ranks of the group: a product over the group needs the same {what} on all of them.
{remedy}"""

NOT_SCALAR = """\
The loss is not a scalar: loss_fn(outputs, targets) gave {came}.
Let it average (reduction="mean") or sum (reduction="sum") over its terms."""

LOSS_ARGUMENTS = """\
{name} takes ({takes}) and is called as loss_fn(outputs, targets).
Pass a function of these two that adds the rest, loss_fn=lambda outputs, targets: ... What differs from batch to batch
may travel in the targets: with batches (inputs, (targets, lengths)), lambda outputs, targets: f(outputs, *targets)."""

NOT_FINITE = """\
The {what} is not finite ({came}) at the present parameters{where}.
Curvature is not defined there. Look for diverged parameters, NaN in the data, or log(0) in the loss."""

SAMPLE_NOT_FINITE = """\
A random sample is not finite ({came}): a product, or its square, holds NaN or leaves the range of float64.
Look for diverged parameters or NaN in the data, measure in float64, or scale the loss down."""

NO_DOUBLE_BACKWARD = """\
{operation} cannot be differentiated twice in this version of torch, so no curvature can be computed through it.
{remedy}
The original error was: {error}"""

HALF_PRECISION = """\
{what}: differences between losses or gradients at neighbouring weights are lost in half precision, here {dtype}.
{remedy}"""

FSDP = """\
{came} is sharded (FSDP or tensor parallel): its parameters are not whole on any rank, and no Hessian-vector product
can be taken through it. Measure an unsharded copy: build the model without sharding and load a full state dict into it,
on one device or under DDP."""

SCRIPTED = """\
{came} is a torch.jit module: its graph cannot be differentiated twice here. Pass the plain nn.Module that it was made
from."""

HIDDEN_PARAMETER = """\
Parameter {name!r} reaches the outputs by another way than as an attribute of its module (a closure, a global or a
nested container holds it), so its curvature would be left out silently. Register it on the module and read it as
self.<name>, or leave it out by naming the others in params=."""

LOSS_USES_PARAMETERS = """\
loss_fn depends on the model's parameter {name!r} directly, not only through the outputs (weight decay in the loss?).
H = GN + NME splits the curvature of loss(outputs(parameters)). Take that term out of loss_fn (its Hessian is known), or
let forward= return it among the outputs."""

RECOMPUTED = """\
A segment under torch.utils.checkpoint did other operations when it was recomputed than in the forward pass, so it
cannot be differentiated twice: {error}
Inside a checkpoint twofold cannot repair operations (weight norm; for HessianTrace, all norms). Run that segment
without a checkpoint, leave its parameters out with params=, or take HessianTrace(method="difference")."""

CHECKPOINT = """\
torch.utils.checkpoint cannot be combined with this product: {error}
Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False); the reentrant form has no second derivative."""

REENTRANT = CHECKPOINT.format(error="its reentrant form hides parameters from torch.autograd.grad.")
