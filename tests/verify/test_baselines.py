"""Tolerances that are checked in."""

from pathlib import Path

import pytest

from mtp_convert.errors import ConvertError
from mtp_convert.verify import baselines
from mtp_convert.verify.result import PlaceError, SideFacts, Verification

SIDE = SideFacts("x", "f", "hf", "safetensors", {})
PLACES = tuple(PlaceError(n, 1e-3, 1e-4, 2e-3, 1.0, 1e-7, 1e-5, 2e-3) for n in ("layers.0", "logits"))


def test_what_is_written_accepts_the_run_that_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tolerances.json"
    baselines.write(path, Verification(SIDE, SIDE, (), PLACES))
    tolerances = baselines.read(path)
    assert tolerances == {"layers.0": 8e-3, "logits": 8e-3}
    assert not any(p.ok for p in PLACES)
    assert all(p.ok for p in baselines.apply(PLACES, tolerances, tolerances.keys()))


def test_places_without_a_tolerance_keep_their_threshold() -> None:
    first, second = baselines.apply(PLACES, {"logits": 1.0}, ["layers.0", "logits"])
    assert (first.threshold, second.threshold) == (1e-5, 1.0)


def test_unknown_places_are_all_named() -> None:
    with pytest.raises(ConvertError) as caught:
        baselines.apply(PLACES, {"layer.0": 1.0, "logit": 1.0, "logits": 1.0}, ["layers.0", "logits"])
    assert [p.got for p in caught.value.problems] == ["layer.0", "logit"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"places": 3}', '{"places": {"logits": "x"}}', '{"places": {"logits": -1}}', '{"places": {"a": true}}'],
)
def test_what_is_no_baseline_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(ConvertError) as caught:
        baselines.read(path)
    assert caught.value.code == "MTP001"


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no such file"):
        baselines.read(tmp_path / "none.json")
