"""ZeRO's engine and its state against torch's own optimizer, over numbers of ranks and stages."""

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from llm import checkpoint as checkpoints
from llm import muon, parts, slices, zero
from llm.losses import following, next_token_nats
from llm.output_head import rows_nats
from llm.presets import PRESETS, build_model, llama_config
from tests.llm.ranks import on_ranks

STEPS, ROWS, TOKENS, VOCAB = 4, 4, 16, 40
SEED, BETAS, DECAY, RATE = 3, (0.9, 0.95), 0.1, 1e-2


class FakeTokenizer:
    eos_token_id = 0
    pad_token_id = 1

    def __len__(self):
        return VOCAB

    def save_pretrained(self, folder):
        pass


@dataclass(frozen=True)
class Case:
    """One training run: how many ranks, which stage, and whether it begins at a checkpoint."""

    ranks: int
    stage: int
    dtype: str = "fp32"
    micro_batch: int = 2
    first: int = 0
    last: int = STEPS
    load: str | None = None
    save: str | None = None
    optimizer: str = "adamw"
    orthogonalised_in: str = "bf16"
    clip_norm: float = 1.0
    preset: str = "micro"
    offload: str = "none"
    offload_to: str = "cpu"
    tensor: int = 1  # ranks that share each layer's matrices
    model_type: str = "llama"

    @property
    def shares(self) -> int:
        """In which a batch is dealt out."""
        return self.ranks // self.tensor


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))


def config(preset: str = "micro", model_type: str = "llama", **own):
    """Of another type, with what that has and Llama hasn't: Qwen 2's biases, Qwen 3's norms of heads."""
    llama = llama_config(PRESETS[preset], FakeTokenizer())
    if model_type == "llama":
        return llama
    same = {key: value for key, value in llama.to_dict().items() if key not in ("model_type", "architectures")}
    return AutoConfig.for_model(model_type, **{**same, **own})


def fresh_model(preset: str = "micro", model_type: str = "llama"):
    return build_model(config(preset, model_type), SEED)


def train(case: Case, folder: Path) -> list[float]:
    """The losses of `case`, trained by as many processes as it has ranks."""
    folder.mkdir(exist_ok=True)
    on_ranks(rank_main, (case, str(folder)), case.ranks)
    return json.loads((folder / "losses.json").read_text())


def rank_main(rank: int, case: Case, folder: str) -> None:
    join(rank, case, folder)
    engine = start(case)
    losses, norms = [], []
    for number in range(case.first, case.last):
        losses.append(step(engine, case, number, rank))
        norms.append(float(engine.get_global_grad_norm()))
    if case.save:
        save(engine, case, rank)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
        Path(folder, "norms.json").write_text(json.dumps(norms))
    leave()


def join(rank: int, case: Case, folder: str) -> None:
    """Make this process rank `rank` of the case's."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous-{case.first}-{case.last}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.ranks)
    zero.deepspeed().init_distributed()


def leave() -> None:
    """End this process without finalising Python, as Ray ends its workers.

    A thread of gloo may be the last to drop a tensor that Python has held. Python 3.11 ends a thread that asks for
    the interpreter while it is finalised, in the middle of C++: "terminate called without an active exception"
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def start(case: Case):
    muon.PRECISION = zero.DTYPES[case.orthogonalised_in]
    saved = checkpoints.newest(Path(case.load)) if case.load else None
    settings = zero.zero_settings(
        stage=case.stage,
        micro_batch=case.micro_batch,
        accumulation=ROWS // case.shares // case.micro_batch,
        dtype=case.dtype,
        clip_norm=case.clip_norm,
        offload=case.offload,
        offload_to=case.offload_to if case.offload_to == "cpu" else f"{case.offload_to}/rank-{dist.get_rank()}",
    )
    model = model_in_parts(case, saved, settings) if case.stage == 3 else whole_model(case, saved)
    model = model.bfloat16() if case.dtype == "bf16" else model
    settings |= slices.settings(model.config, case.tensor)
    engine = zero.initialise(model, settings, betas=BETAS, weight_decay=DECAY, optimizer=case.optimizer)
    if saved:
        checkpoints.restore_state(saved, zero.fragments(engine))
        zero.set_counters(engine, saved.counters)
    zero.set_learning_rate(engine, RATE)
    return engine


def whole_model(case: Case, saved):
    return AutoModelForCausalLM.from_pretrained(saved.model) if saved else fresh_model(case.preset, case.model_type)


def model_in_parts(case: Case, saved, settings):
    """As training builds it under ZeRO-3."""
    share = zero.sharer(settings, case.dtype)
    return parts.read_model(saved.model, share) if saved else parts.draw_model(config(case.preset), SEED, share)


def step(engine, case: Case, number: int, rank: int) -> float:
    mine = batch(number).chunk(case.shares)[rank // case.tensor].split(case.micro_batch)
    scale = zero.averaged_over(engine) * len(mine) / (ROWS * (TOKENS - 1))
    total = torch.zeros(1)
    for part in mine:
        nats = rows_nats(engine, part, following(part))
        engine.backward(nats * scale)
        engine.step()
        total += nats.detach()
    dist.all_reduce(total)
    return total.item() / case.tensor / (ROWS * (TOKENS - 1))


def save(engine, case: Case, rank: int) -> None:
    weights = zero.whole_weights(engine)
    checkpoints.save(
        Path(case.save),
        case.last,
        rank=rank,
        world=case.ranks,
        fragments=checkpoints.copies(zero.fragments(engine)),
        save_model=lambda path: checkpoints.save_model(path, engine.module, weights, FakeTokenizer()),
        gather=lambda mine: everyones(mine, case.ranks),
        facts={"optimizer": zero.counters(engine)},
    )


def everyones(mine: dict[str, str], ranks: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(found, mine)
    return found


def reference(model_type: str = "llama") -> list[float]:
    return [loss for loss, _ in reference_steps(model_type)]


def reference_steps(model_type: str = "llama") -> list[tuple[float, float]]:
    """The same training by torch's AdamW on the whole batch, without DeepSpeed: losses and norms of the gradient."""
    model = fresh_model(model_type=model_type)
    optimizer = torch.optim.AdamW(zero.parameter_groups(model, DECAY), lr=RATE, betas=BETAS)
    steps = []
    for number in range(STEPS):
        ids = batch(number)
        loss = next_token_nats(model(input_ids=ids).logits, ids) / (ROWS * (TOKENS - 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case(1, 1), Case(1, 2, micro_batch=4), Case(2, 2), Case(2, 2, micro_batch=1), Case(2, 3)], ids=str
)
def test_training_equals_torchs_adamw_on_the_whole_batch(case, tmp_path):
    assert train(case, tmp_path / "run") == pytest.approx(reference(), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_what_is_offloaded_to_memory_is_trained_saved_and_restored_like_the_rest(stage, offload, tmp_path):
    whole, store = train(Case(2, stage), tmp_path / "whole"), str(tmp_path / "checkpoints")
    away = partial(Case, 2, stage, offload=offload)
    assert train(away(last=2, save=store), tmp_path / "first") == pytest.approx(whole[:2], abs=2e-5)
    assert train(away(first=2, load=store), tmp_path / "second") == pytest.approx(whole[2:], abs=2e-5)


@pytest.mark.soak  # DeepSpeed compiles its way to the disk at first use, which takes minutes
def test_what_is_offloaded_to_a_disk_is_saved_and_goes_on_in_memory_and_back(tmp_path):
    if not zero.deepspeed().ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio's headers and a C++ compiler")
    whole, store = train(Case(2, 3, preset="tiny"), tmp_path / "whole"), str(tmp_path / "checkpoints")
    away = partial(Case, 2, 3, preset="tiny", offload="optimizer", offload_to=str(tmp_path / "disk"))
    assert train(away(last=2, save=store), tmp_path / "first") == pytest.approx(whole[:2], abs=2e-5)
    assert {path.name.partition("-")[0] for path in tmp_path.glob("disk/rank-1/**/*.swp")} >= {"exp_avg", "exp_avg_sq"}
    third = Case(1, 3, preset="tiny", first=2, last=3, load=store, save=store)
    assert train(third, tmp_path / "second") == pytest.approx(whole[2:3], abs=2e-5)
    assert train(away(first=3, load=store), tmp_path / "third") == pytest.approx(whole[3:], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 2), ("bf16", 2), ("fp32", 3)])
def test_resumed_equals_uninterrupted_bit_for_bit(dtype, stage, tmp_path):
    whole = train(Case(2, stage, dtype), tmp_path / "whole")
    store = str(tmp_path / "checkpoints")
    train(Case(2, stage, dtype, last=2, save=store), tmp_path / "first")
    assert train(Case(2, stage, dtype, first=2, load=store), tmp_path / "second") == whole[2:]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 2)), ((1, 1), (2, 2)), ((2, 2), (2, 3)), ((2, 3), (2, 2))])
def test_a_checkpoint_moves_between_numbers_of_ranks_and_stages(before, after, tmp_path):
    store = str(tmp_path / "checkpoints")
    train(Case(*before, last=2, save=store), tmp_path / "first")
    resumed = train(Case(*after, first=2, load=store), tmp_path / "second")
    assert resumed == pytest.approx(reference()[2:], abs=2e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for last in (1, 2):
        train(Case(1, 2, last=last, micro_batch=4, save=str(folder / "checkpoints")), folder / f"run-{last}")
    return folder / "checkpoints"


@pytest.mark.slow
def test_a_checkpoint_loads_without_this_project(saved):
    model = AutoModelForCausalLM.from_pretrained(checkpoints.newest(saved).model)
    assert model.lm_head.weight.shape == (VOCAB, PRESETS["micro"].hidden)
    assert not torch.equal(model.lm_head.weight, fresh_model().lm_head.weight), "it was trained"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_the_one_before_a_damaged_checkpoint_is_used(saved, damage, tmp_path, caplog):
    import shutil

    store = tmp_path / "checkpoints"
    shutil.copytree(saved, store)
    victim = store / "step-00000002" / ("manifest.json" if damage == "manifest" else "model/model.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        content[-1] ^= 1
        victim.write_bytes(content[: len(content) // 2] if damage in ("truncate", "manifest") else content)
    assert checkpoints.newest(store).step == 1
    assert "step-00000002 is damaged" in caplog.text


@pytest.mark.slow
def test_state_of_another_model_is_refused(saved):
    fragment = zero.Fragment("model.embed_tokens.weight", 0, {"weight": torch.zeros(10**6)})
    with pytest.raises(ValueError, match="written for another model"):
        checkpoints.restore_state(checkpoints.newest(saved), [fragment])


def test_no_checkpoint_is_no_checkpoint(tmp_path):
    assert checkpoints.newest(tmp_path / "nowhere") is None
