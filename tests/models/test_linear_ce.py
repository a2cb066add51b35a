"""Chunked and linear cross entropy: gradients, what they keep in memory, precision, a sharded LM head."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from _loss_kit import IGNORED, MAKERS, H, Loss, T, V, inputs, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_convert.models.linear_ce import FusedLinearCrossEntropy, LinearCrossEntropy
from mtp_convert.models.losses import ChunkedCrossEntropy, MaskedCrossEntropy
from mtp_convert.models.token_losses import chunked_losses, linear_losses


def small_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """As `inputs`, 6 tokens of 5 words and 4 numbers each: few enough for finite differences."""
    hidden, weight, labels = inputs()
    return hidden[:6, :4].detach().requires_grad_(), weight[:5, :4].detach().requires_grad_(), labels[:6].clamp(max=4)


@pytest.mark.parametrize("chunk_len", [1, 3, 100])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradcheck_of_the_linear_loss(chunk_len: int, softcap: float) -> None:
    hidden, weight, labels = small_inputs()
    settings: dict[str, Any] = {"ignore_index": IGNORED, "chunk_len": chunk_len, "softcap": softcap}
    assert torch.autograd.gradcheck(lambda h, w: linear_losses(h, w, labels, **settings), (hidden, weight))
    for fixed in range(2):  # one gradient alone
        pair = [hidden.detach(), weight.detach()]
        pair[fixed].requires_grad_()
        assert torch.autograd.gradcheck(lambda h, w: linear_losses(h, w, labels, **settings), pair)


def test_gradcheck_of_the_chunked_loss() -> None:
    hidden, weight, labels = inputs()
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: chunked_losses(z, labels, ignore_index=IGNORED, chunk_len=5), (logits,))


def test_softcap_bends_the_logits() -> None:
    hidden, weight, labels = inputs()
    loss = FusedLinearCrossEntropy(IGNORED, logit_softcapping=2.0, chunk_len=3)
    expected = F.cross_entropy(2 * torch.tanh(hidden @ weight.T / 2), labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(run(loss, hidden, weight, labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [MAKERS["chunked"], MAKERS["fused"]])
def test_second_derivatives_are_refused(make: Callable[[str], Loss]) -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(RuntimeError, match="no second derivative; call backward without create_graph"):
        torch.autograd.grad(run(make("sum"), hidden, weight, labels), hidden, create_graph=True)


# --- memory


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    largest = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        return result


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, words, width = 512, 128, 16
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width, requires_grad=True)
    labels = torch.randint(words, (tokens,))
    with Sizes() as plain:
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    with Sizes() as fused:
        FusedLinearCrossEntropy(chunk_len=8)(hidden, labels, weight).backward()
    assert plain.largest == tokens * words
    assert fused.largest == tokens * width  # the hidden states and their gradient; logits are 8 * words


def test_default_chunk_is_as_large_as_the_hidden_states() -> None:
    tokens, words, width = 2048, 1024, 128
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width, requires_grad=True)
    with Sizes() as sizes:
        FusedLinearCrossEntropy()(hidden, torch.zeros(tokens, dtype=torch.long), weight).backward()
    assert sizes.largest == tokens * width


@pytest.mark.parametrize("name", ["chunked", "fused"])
def test_between_the_passes_only_inputs_are_kept(name: str) -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    logits = (hidden @ weight.T).detach().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        if name == "fused":
            FusedLinearCrossEntropy(IGNORED, chunk_len=2)(hidden, labels, weight)
        else:
            ChunkedCrossEntropy(2, IGNORED)(logits, labels)
    own = {t.data_ptr() for t in (hidden, weight, logits, labels)}
    assert [t.shape for t in kept if t.data_ptr() not in own] == [(T,)]


# --- precision


def test_weight_gradient_is_summed_in_float32() -> None:
    """Thousands of small chunks into one bfloat16 tensor would lose whole digits; here only the last cast rounds."""
    tokens = 4096
    torch.manual_seed(0)
    hidden, weight = torch.rand(tokens, H).bfloat16(), torch.randn(V, H).bfloat16().requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.long)
    FusedLinearCrossEntropy(chunk_len=2)(hidden, labels, weight).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert exact.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_different_dtypes_meet_in_the_wider_one(wide: str) -> None:
    hidden, weight, labels = inputs(torch.float32)
    if wide == "hidden":
        weight = weight.detach().bfloat16().requires_grad_()
    else:
        hidden = hidden.detach().bfloat16().requires_grad_()
    loss = FusedLinearCrossEntropy(IGNORED, chunk_len=4)(hidden, labels, weight)
    expected = F.cross_entropy(hidden.float() @ weight.float().T, labels, ignore_index=IGNORED, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in found] == [hidden.dtype, weight.dtype]
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_is_the_same_as_casting() -> None:
    hidden, weight, labels = inputs(torch.float32)
    loss = FusedLinearCrossEntropy(IGNORED, chunk_len=4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(hidden, labels, weight)
    expected = loss(hidden.bfloat16(), labels, weight.bfloat16())
    assert torch.equal(cast, expected)
    assert not torch.equal(cast, loss(hidden, labels, weight))
    for ours, theirs in zip(
        torch.autograd.grad(cast, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_upcast_of_narrow_logits() -> None:
    logits, labels = torch.randn(T, V).bfloat16(), inputs()[2]
    exact = F.cross_entropy(logits.double(), labels, ignore_index=IGNORED, reduction="sum")
    for loss in (MaskedCrossEntropy(ignore_index=IGNORED), ChunkedCrossEntropy(3, IGNORED)):
        assert loss(logits, labels).dtype == torch.float32
        torch.testing.assert_close(loss(logits, labels).double(), exact, rtol=1e-6, atol=0)
    assert MaskedCrossEntropy(fp32_upcast=False, ignore_index=IGNORED)(logits, labels).dtype == torch.bfloat16


# --- a sharded LM head


def sharded_head(rank: int, store: str, queue: Any) -> None:  # noqa: ANN401
    """One of two ranks: its own tokens, its half of the head."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    hidden, whole, labels = inputs()
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    refused = ""
    try:
        LinearCrossEntropy.materialize_lm_weight(weight)
    except ValueError as error:
        refused = str(error)
    with torch.no_grad():
        gathered = LinearCrossEntropy.materialize_lm_weight(weight)
    tokens = slice(0, 9) if rank == 0 else slice(9, T)
    loss = MAKERS["fused"]("sum")(hidden[tokens], labels[tokens], weight, grad_reduce_group=dist.group.WORLD)
    loss.backward()
    assert weight.grad is not None
    gradient = weight.grad.full_tensor()  # type: ignore[attr-defined]
    queue.put((rank, refused, gathered.numpy(), loss.detach().numpy(), gradient.numpy()))
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_head_is_gathered_and_its_gradient_averaged(tmp_path: Any) -> None:  # noqa: ANN401
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(sharded_head, (str(tmp_path / "store"), queue), nprocs=2, join=False)  # type: ignore[no-untyped-call]
    results = sorted(queue.get() for _ in range(2))
    context.join()
    hidden, weight, labels = inputs()
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
    (expected,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(torch.tensor(sum(r[3] for r in results)), loss.detach())
    for _, refused, gathered, _, gradient in results:
        assert "mesh size=2, reduction group size=1" in refused
        assert torch.equal(torch.from_numpy(gathered), weight)
        torch.testing.assert_close(torch.from_numpy(gradient), expected / 2)


def test_plain_head_is_not_gathered() -> None:
    weight = torch.zeros(V, H)
    assert LinearCrossEntropy.materialize_lm_weight(weight) is weight
