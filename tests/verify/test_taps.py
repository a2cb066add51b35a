"""What listens to a pass keeps and gives exactly what it should."""

import pytest
import torch

from mtp_convert.verify.taps import Forced, Halves, Recorder, Synthetic


def test_a_recorder_shares_what_flows_from_place_to_place() -> None:
    tap, first, second = Recorder(), torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    tap.leave("embedding", first)
    assert tap.enter("layers.0", first.view(1, 2, 3)) is not None
    tap.leave("layers.0", second)
    assert tap.inputs["layers.0"].data_ptr() == tap.outputs["embedding"].data_ptr()
    first.zero_()
    assert tap.inputs["layers.0"].abs().sum() > 0, "what is kept must not change with the model's memory"


def test_forced_inputs_replace_and_shapes_are_checked() -> None:
    known = {"layers.0": torch.ones(1, 2, 3)}
    tap = Forced(known)
    given = tap.enter("layers.0", torch.zeros(1, 2, 3, dtype=torch.float64))
    assert given.dtype == torch.float64
    assert bool((given == 1).all())
    with pytest.raises(ValueError, match=r"layers\.0.*\[1, 2, 4\].*\[1, 2, 3\]"):
        tap.enter("layers.0", torch.zeros(1, 2, 4))


def test_halves_force_the_second_half_alone() -> None:
    tap = Halves({"layers.0": torch.ones(1, 2, 3)})
    value = tap.enter("layers.0", torch.zeros(2, 2, 3))
    assert value[0].sum() == 0
    assert bool((value[1] == 1).all())
    tap.leave("layers.0", value)
    assert tap.free["layers.0"].shape == tap.forced["layers.0"].shape == (1, 2, 3)


def test_synthetic_inputs_are_the_same_every_time_and_differ_by_place() -> None:
    one, two = Synthetic(3), Synthetic(3)
    for place in ("layers.0", "layers.5"):
        assert torch.equal(one.enter(place, torch.zeros(2, 4, 8)), two.enter(place, torch.ones(2, 4, 8)))
    assert not torch.equal(one.inputs["layers.0"], one.inputs["layers.5"])
