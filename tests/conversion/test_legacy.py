"""Legacy (mp_rank) checkpoints: read at any sizes, written at any sizes that divide, byte for byte there and back."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, MEGATRON, TINY, Cli, convert, differing, files_of
from _legacy import FILE, WIDE, edit, legacy, load, refused, same_model, states, with_vocabulary
from safetensors.torch import load_file, save_file

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.containers import megatron_legacy
from mtp_convert.difference import diff

SIZES: dict[str, dict[str, int]] = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp6": {"pipeline": 6},
    "ep8": {"expert": 8},
    "pp2 vpp3": {"pipeline": 2, "virtual": 3},
    "pp3 vpp2 ep2": {"pipeline": 3, "virtual": 2, "expert": 2},
    "tp2 ep4": {"tensor": 2, "expert": 4},
    "tp2 ep4 etp1": {"tensor": 2, "expert": 4, "expert_tensor": 1},
    "tp2 ep1 etp1": {"tensor": 2, "expert_tensor": 1},
    "tp2 pp3 ep2": {"tensor": 2, "pipeline": 3, "expert": 2},
    "pp2 first 1": {"pipeline": 2, "first": 1},
    "pp3 first 1 last 3": {"pipeline": 3, "first": 1, "last": 3},
}


@pytest.mark.parametrize(("model", "others"), [("hyb_m", ("legacy", "legacy_tp2")), ("dsv3_te", ("legacy",))])
def test_every_container_of_megatron_core_gives_the_same_folder(
    model: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    for name in ("ckpt", *others):
        convert(MEGATRON / model / name, tmp_path / name, "hf", hf_config=MEGATRON / model / "config.json")
    wanted = files_of(tmp_path / "ckpt")
    assert wanted
    for name in others:
        assert files_of(tmp_path / name) == wanted


@pytest.mark.parametrize(
    ("model", "name", "sizes"),
    [("hyb_m", "legacy", {}), ("hyb_m", "legacy_tp2", {"tensor": 2}), ("dsv3_te", "legacy", {})],
)
def test_ranks_are_what_megatron_core_wrote(model: str, name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    folder = MEGATRON / model
    options = {"container": "legacy", "parallel": sizes, "hf_config": folder / "config.json"}
    convert(folder / "ckpt", tmp_path / "there", "megatron", **options)
    ours, theirs = states(tmp_path / "there"), states(folder / name, "iter_0000001")
    assert ours.keys() == theirs.keys()
    for rank in theirs:
        same_model(ours[rank], theirs[rank])


@pytest.mark.parametrize("name", SIZES)
def test_hf_files_come_back(name: str, tmp_path: Path) -> None:
    sizes = SIZES[name]
    there = legacy(tmp_path / "there", **sizes)
    found = open_checkpoint(there)
    known = {n: v for n, v in sizes.items() if n in found.stored.parallel}
    assert known.items() <= found.stored.parallel.items()
    convert(there, tmp_path / "back", "hf")
    assert differing(WIDE, tmp_path / "back") == []


@pytest.mark.parametrize("name", ["tp2", "pp2", "ep8", "pp2 vpp3", "tp2 ep4 etp1", "tp2 ep1 etp1", "pp2 first 1"])
def test_sizes_are_found_without_arguments(name: str, tmp_path: Path) -> None:
    """Megatron-Core's own state has none: names and shapes have to say what the numbers of the folders count."""
    there = legacy(tmp_path / "there", **SIZES[name])
    before = open_checkpoint(there).stored.parallel
    edit(there, lambda state: state.update(args=Namespace()))
    found = open_checkpoint(there)
    assert found.stored.parallel == before
    assert diff(open_checkpoint(WIDE), found).equal


@pytest.mark.parametrize(("source", "target"), [("tp2 pp3 ep2", "pp2 vpp3"), ("ep8", "tp2 ep4 etp1"), ("tp2", "one")])
def test_resharding_is_converting(source: str, target: str, tmp_path: Path) -> None:
    """A checkpoint that was divided before becomes, byte for byte, what is written from the whole model."""
    legacy(tmp_path / "before", **SIZES[source])
    legacy(tmp_path / "after", tmp_path / "before", **SIZES[target])
    legacy(tmp_path / "direct", **SIZES[target])
    assert files_of(tmp_path / "after") == files_of(tmp_path / "direct")


def test_torch_dist_and_legacy_are_two_containers_of_one_layout(tmp_path: Path) -> None:
    convert(WIDE, tmp_path / "dist", "megatron")
    legacy(tmp_path / "legacy", tmp_path / "dist", tensor=2, pipeline=2)
    convert(tmp_path / "legacy", tmp_path / "dist2", "megatron")
    wanted, found = files_of(tmp_path / "dist"), files_of(tmp_path / "dist2")
    assert {n: c for n, c in found.items() if n in wanted} == wanted
    assert diff(open_checkpoint(tmp_path / "dist"), open_checkpoint(tmp_path / "legacy")).equal


def test_a_rank_holds_what_megatron_lm_expects(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2, pipeline=2, expert=2, virtual=3)
    assert (there / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert not (there / "release" / "metadata.json").exists()  # by which Megatron-LM knows torch_dist
    found = states(there)
    assert set(found) == {f"mp_rank_{t:02d}_{p:03d}_{e:03d}" for t in range(2) for p in range(2) for e in range(2)}
    for state in found.values():
        assert list(state) == ["args", "checkpoint_version", "iteration", "model0", "model1", "model2"]
        assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
    args = vars(found["mp_rank_00_000_000"]["args"])
    wanted = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 3,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
        "ckpt_format": "torch",
        "padded_vocab_size": 64,
        "hybrid_layer_pattern": "M|*|E|-|M|E/M*-E/M*-E",
    }
    assert {n: args.get(n) for n in wanted} == wanted
    experts = found["mp_rank_01_000_001"]["model1"]  # the third chunk of six
    assert experts["decoder.layers.0.mlp.experts.linear_fc1.weight3"].shape == (12, 32)
    assert "decoder.layers.0.mlp.experts.linear_fc1.weight4" not in experts
    first, last = found["mp_rank_00_000_000"]["model0"], found["mp_rank_00_001_000"]["model2"]
    assert first["embedding.word_embeddings.weight"].equal(last["embedding.word_embeddings.weight"])
    assert last["output_layer._extra_state"] is None
    assert last["mtp.layers.0.eh_proj._extra_state"].shape == (0,)
    assert "output_layer.weight" not in first


@pytest.mark.parametrize(
    ("version", "conv", "inner"), [("0.17", "conv1d.weight", True), ("0.19", "conv1d_weight", True)]
)
def test_names_follow_the_release(version: str, conv: str, inner: bool, tmp_path: Path) -> None:
    convert(WIDE, tmp_path / "there", "megatron", container="legacy", megatron_version=version)
    (state,) = states(tmp_path / "there").values()
    assert f"decoder.layers.0.mixer.{conv}" in state["model"]
    assert any("mtp_model_layer" in n for n in state["model"]) == inner
    assert diff(open_checkpoint(WIDE), open_checkpoint(tmp_path / "there")).equal


def test_sequential_experts_are_read(tmp_path: Path) -> None:
    """Without grouped matrix products every expert is a module of its own."""
    there = legacy(tmp_path / "there", expert=2)

    def rename(state: dict[str, dict[str, torch.Tensor]]) -> None:
        for name in [n for n in state["model"] if ".experts.linear_fc" in n and "_extra" not in n]:
            path, _, number = name.rpartition(".weight")
            head, _, module = path.rpartition(".")
            state["model"][f"{head}.local_experts.{number}.{module}.weight"] = state["model"].pop(name)

    found = open_checkpoint(edit(there, rename))
    assert found.layout.words["experts"] == "sequential"
    assert diff(open_checkpoint(WIDE), found).equal


def test_output_does_not_depend_on_threads_or_time(tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("five", 5)):
        parallel = {"tensor": 2, "pipeline": 2}
        convert(
            TINY, tmp_path / name, "megatron", container="legacy", parallel={**parallel, "first": 3}, threads=threads
        )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "five")


def test_vocabulary_rows_are_padded_for_equal_shares(tmp_path: Path) -> None:
    source = with_vocabulary(tmp_path / "src", 63)
    there = legacy(tmp_path / "there", source, tensor=2)
    parts = [s["model"]["embedding.word_embeddings.weight"] for s in states(there).values()]
    assert [p.shape[0] for p in parts] == [32, 32]
    assert not parts[1][31].any()
    assert vars(load(there / "release" / "mp_rank_00" / FILE)["args"])["padded_vocab_size"] == 64
    result = convert(there, tmp_path / "back", "hf")
    assert any("padding rows" in note for note in result.notes)
    assert differing(source, tmp_path / "back") == []


def test_asked_padding_counts_per_rank(tmp_path: Path) -> None:
    source = AUTOMODEL / "nemotron_d1"
    convert(source, tmp_path / "there", "megatron", container="legacy", parallel={"tensor": 2}, padding=48)
    states_ = states(tmp_path / "there")
    assert {s["model"]["output_layer.weight"].shape[0] for s in states_.values()} == {48}
    legacy(tmp_path / "again", tmp_path / "there")  # the padding it had stays
    (state,) = states(tmp_path / "again").values()
    assert state["model"]["output_layer.weight"].shape[0] == 96


class TestTied:
    """An output layer that is the embedding; a later stage has a copy of its own."""

    def test_one_stage_stores_it_once(self, tmp_path: Path) -> None:
        source = with_vocabulary(tmp_path / "src", 64, tied=True)
        (state,) = states(legacy(tmp_path / "there", source)).values()
        assert "output_layer.weight" not in state["model"]
        assert state["model"]["output_layer._extra_state"] is None

    @pytest.mark.parametrize("virtual", [1, 3])
    def test_the_copy_beside_an_embedding_is_not_read(self, virtual: int, tmp_path: Path) -> None:
        """Megatron allocates it on the stage with MTP and never uses it: training leaves anything there."""
        source = with_vocabulary(tmp_path / "src", 64, tied=True)
        there = legacy(tmp_path / "there", source, pipeline=2, tensor=2, virtual=virtual)
        last = "model" if virtual == 1 else "model2"
        for t in range(2):
            edit(there, lambda s: s[last]["output_layer.weight"].fill_(7.0), f"mp_rank_0{t}_001")
        result = convert(there, tmp_path / "back", "hf")
        assert any("output_layer.weight of the last stage is not read" in n for n in result.notes)
        assert differing(source, tmp_path / "back") == []

    def test_the_copy_that_is_used_has_to_agree(self, tmp_path: Path) -> None:
        tensors = load_file(with_vocabulary(tmp_path / "src", 64, tied=True) / "model.safetensors")
        config = (tmp_path / "src" / "config.json").read_text()
        plain = tmp_path / "plain"
        plain.mkdir()
        save_file({n: t for n, t in tensors.items() if not n.startswith("mtp.")}, plain / "model.safetensors")
        (plain / "config.json").write_text(
            config.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')
        )
        there = legacy(tmp_path / "there", plain, pipeline=2)
        assert open_checkpoint(there).copies == {"output_layer.weight"}
        convert(there, tmp_path / "back", "hf")
        edit(there, lambda s: s["model"]["output_layer.weight"].fill_(7.0), "mp_rank_00_001")
        assert "output_layer.weight is not the copy" in refused("MTP026", convert, there, tmp_path / "no", "hf")


def test_optimizer_and_random_states_stay_behind(tmp_path: Path) -> None:
    there = legacy(tmp_path / "there", tensor=2)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    rng = [{"torch_rng_state": torch.get_rng_state(), "random_rng_state": (3, (1, 2), None)}]
    edit(there, lambda s: s.update(optimizer=optimizer, rng_state=rng, iteration=7))
    torch.save({}, there / "release" / "mp_rank_00" / "distrib_optim.pt")
    found = open_checkpoint(there)
    assert found.stored.training == {
        *(f"mp_rank_0{t}/{name}" for t in range(2) for name in ("optimizer", "rng_state")),
        "mp_rank_00/distrib_optim.pt",
    }
    convert(there, tmp_path / "back", "hf")
    assert differing(WIDE, tmp_path / "back") == []


def test_reading_touches_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "mp_rank_00"
    place.mkdir()
    torch.save({"model": {f"t{i}": torch.zeros(1 << 22) for i in range(4)}}, place / FILE)
    seen = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: seen.append(n) or pread(fd, n, at))
    found = megatron_legacy.read(tmp_path)
    assert len(found["mp_rank_00"].models["model"]) == 4
    assert 0 < sum(seen) < 64 << 10


def test_the_command_line_shows_and_reshards(cli: Cli, tmp_path: Path) -> None:
    there, again = tmp_path / "there", tmp_path / "again"
    sizes = ("--container", "legacy", "--tp", "2", "--pp", "2", "--ep", "2", "--vpp", "3", "--etp", "1")
    assert cli("hf-to-megatron", WIDE, there, *sizes).code == 0
    data = cli("inspect", there, "--format", "json").data
    assert data["container"] == "legacy"
    assert data["parallel"] == {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1, "virtual": 3}
    assert (len(data["files"]), data["files"][0]) == (4, f"mp_rank_00_000_000/{FILE}")
    assert "virtual pipeline parallel 3" in cli("inspect", there).out
    layout = ("--pipeline-model-parallel-layout", "Et|t*5,mmL", "--pp", "2")
    assert cli("convert", there, again, "--to", "megatron", "--container", "legacy", *layout).code == 0
    assert "M|*E-ME/M*-E/M*-E" in str(states(again)["mp_rank_00_001"]["args"])
    assert cli("diff", WIDE, again).code == 0
    assert cli("check", again).code == 0
    assert cli("roundtrip", again).code == 0
