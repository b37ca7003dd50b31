"""Reading checkpoints: any layout reads any other bit for bit, and what is broken is named."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint import Checkpoint, open_checkpoint, open_latest, steps
from parallel.errors import UserError
from parallel.saving import Saver
from parallel.shards import Cut, Piece, mark_cut, mark_experts, pieces
from tests.ranks import run_ranks
from tests.tilings import tiling

LAYOUTS = {"one": 1, "rows": 2, "flat": 3, "columns": 4}  # name -> ranks
NUM_EXPERTS = 4


def canonical() -> dict[str, Tensor]:
    """What every layout holds, whole."""
    made = torch.Generator().manual_seed(0)
    experts = {f"experts.{e}.up.weight": torch.randn(4, 8, generator=made) for e in range(NUM_EXPERTS)}
    return experts | {
        "out.weight": torch.randn(8, 12, generator=made),
        "deep.weight": torch.randn(4, 4, 8, generator=made).bfloat16(),
        "bias": torch.randn(5, generator=made),
        "counts": torch.randint(99, (7,), generator=made),
        "random": torch.randint(255, (9,), generator=made, dtype=torch.uint8),
        "step": torch.tensor(12),
        "nothing": torch.zeros(0, 3),
    }


def parameters(layout: str, rank: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Empty parameters that hold this rank's part of the matrices."""
    sections = {"up.weight": 2}  # a stack of experts, each with gate rows and up rows
    ranks = LAYOUTS[layout]
    for name, shape in (("out.weight", [8, 12]), ("deep.weight", [4, 4, 8]), ("up.weight", [4, 8])):
        cut = None
        if layout in ("rows", "columns"):
            dim = ("rows", "columns").index(layout)
            cut = Cut(dim, rank, ranks, sections.get(name, 1) if dim == 0 else 1)
            shape[dim] //= ranks
        stack = [NUM_EXPERTS] if name in sections else []
        dtype = torch.bfloat16 if name.startswith("deep") else torch.float32
        parameter = nn.Parameter(torch.zeros(*stack, *shape, dtype=dtype))
        if stack:
            mark_experts(parameter, tuple(range(NUM_EXPERTS)))
        mark_cut(parameter, cut)
        yield ("experts." + name if stack else name), parameter


def held(layout: str, rank: int) -> list[Piece]:
    """Zeroed pieces of all that this rank owns."""
    found: list[Piece] = []
    for name, parameter in parameters(layout, rank):
        begin, end = 0, parameter.numel()
        if layout == "flat":  # uneven, and from the middle of a row to the middle of another
            bounds = [0, end // 5 + 1, end // 2 + 3, end]
            begin, end = bounds[rank : rank + 2]
        found += pieces(name, parameter, torch.zeros(end - begin, dtype=parameter.dtype), begin)
    if rank == 0:
        done = {piece.name for piece in found}
        for name, tensor in canonical().items():
            if tensor.dim() < 2 or not tensor.numel():
                assert name not in done
                found.append(Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), torch.zeros_like(tensor)))
    return found


def save_under(rank: int, world_size: int, root: Path, layout: str) -> int:
    """Save what the canonical tensors are where this rank holds them; the number of pieces."""
    whole = canonical()
    owned = held(layout, rank)
    for piece in owned:
        piece.tensor.copy_(whole[piece.name][piece.place])
    saver = Saver(root, dist.group.WORLD if world_size > 1 else None, keep_last=1)
    saver.save(1, owned, {"layout": layout})
    saver.wait()
    return len(owned)


def differing(rank: int, world_size: int, root: Path, layout: str) -> list[str]:
    """Whatever is not read under this layout as every layout saved it."""
    whole, wrong = canonical(), []
    for made in LAYOUTS:
        saved = open_checkpoint(root / made / "step-1", verify=rank == 0)
        assert set(saved.names) == set(whole) and saved.state == {"layout": made}
        for piece in held(layout, rank):
            saved.read_into(piece)
            if not torch.equal(piece.tensor, whole[piece.name][piece.place]):
                wrong.append(f"{made} -> {layout}: {piece.name} {piece.offset}")
        wrong += [f"{made}: {n}" for n, t in whole.items() if not same(saved.read(n), t)]
    return wrong


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def on_ranks(function: Callable[..., Any], layout: str, *args: Any) -> list[Any]:
    ranks = LAYOUTS[layout]
    return [function(0, 1, *args)] if ranks == 1 else run_ranks(ranks, function, *args)


def test_every_layout_reads_every_other(tmp_path: Path) -> None:
    for layout, ranks in LAYOUTS.items():
        counts = on_ranks(save_under, layout, tmp_path / layout, layout)
        assert len(counts) == ranks and all(counts)
        files = {path.name for path in (tmp_path / layout / "step-1").iterdir()}
        assert files == {"index.json", *(f"rank-{rank:05d}.safetensors" for rank in range(ranks))}
    for layout, ranks in LAYOUTS.items():
        assert on_ranks(differing, layout, tmp_path, layout) == [[]] * ranks


def random_tensors(rng: random.Random) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(rng.randrange(1000))
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    shapes = [tuple(rng.randint(0 if rng.random() < 0.1 else 1, 6) for _ in range(i % 5)) for i in range(30)]
    return {
        f"t{index}": torch.randint(200, shape, generator=made).to(rng.choice(dtypes))
        for index, shape in enumerate(shapes)
    }


def save_random(rank: int, world_size: int, root: Path, seed: int) -> None:
    """Every tensor cut at random, its rectangles dealt to random ranks."""
    rng = random.Random(seed)
    owned = []
    for name, tensor in random_tensors(rng).items():
        for each in tiling(rng, tuple(tensor.shape)):
            piece = Piece(
                name, tuple(tensor.shape), each.offset, torch.empty(each.extent, dtype=tensor.dtype)
            )
            piece.tensor.copy_(tensor[piece.place])
            if rng.randrange(world_size) == rank:
                owned.append(piece)
    rng.shuffle(owned)
    saver = Saver(root, dist.group.WORLD, keep_last=1)
    saver.save(1, owned, {})
    saver.wait()


@pytest.mark.parametrize("seed", range(3))
def test_random_rectangles_are_read_from_random_rectangles(tmp_path: Path, seed: int) -> None:
    run_ranks(3, save_random, tmp_path, seed)
    saved = open_checkpoint(tmp_path / "step-1")
    tensors = random_tensors(random.Random(seed))
    rng = random.Random(seed + 100)
    for name, tensor in tensors.items():
        assert same(saved.read(name), tensor)
        for _ in range(5):
            each = rng.choice(tiling(rng, tuple(tensor.shape)))
            order = tuple(reversed(range(tensor.dim())))  # a view that is not in the order of memory
            target = torch.zeros(each.extent[::-1], dtype=tensor.dtype).permute(order)
            wanted = Piece(name, tuple(tensor.shape), each.offset, target)
            saved.read_into(wanted)
            assert torch.equal(target, tensor[wanted.place])


def piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def save_one(root: Path, step: int) -> Path:
    saver = Saver(root, None, keep_last=9)
    saver.save(
        step, [piece("a", torch.full((2, 3), float(step))), piece("b", torch.tensor([step]))], {"step": step}
    )
    folder = saver.wait()
    assert folder is not None
    return folder


def test_only_what_overlaps_is_read(tmp_path: Path) -> None:
    run_ranks(2, save_under, tmp_path, "rows")
    saved = open_checkpoint(tmp_path / "step-1")
    (tmp_path / "step-1" / "rank-00000.safetensors").unlink()
    lower = Piece("out.weight", (8, 12), (5, 3), torch.zeros(2, 4))
    saved.read_into(lower)
    assert torch.equal(lower.tensor, canonical()["out.weight"][5:7, 3:7])


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in files} == {".safetensors", ".json", "latest"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in files)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forget(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json"])
@pytest.mark.parametrize("harm", [flip_a_bit, truncate, forget, empty])
def test_a_broken_checkpoint_is_named_and_an_earlier_one_used(
    harm: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    for step in (1, 2):
        save_one(tmp_path, step)
    harm(tmp_path / "step-2" / file)
    warnings: list[str] = []
    saved = open_latest(tmp_path, warnings.append)
    assert saved is not None and saved.state == {"step": 1} and saved.read("b").item() == 1
    (warning,) = warnings
    assert f"checkpoint {tmp_path / 'step-2'} is broken (" in warning and "using an earlier one" in warning
    harm(tmp_path / "step-1" / file)
    with pytest.raises(UserError, match=r"step-1 is broken \("):
        open_latest(tmp_path, warnings.append)


def test_every_rank_s_file_is_verified(tmp_path: Path) -> None:
    run_ranks(3, save_under, tmp_path, "flat")
    for rank in range(3):
        path = tmp_path / "step-1" / f"rank-{rank:05d}.safetensors"
        good = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(UserError, match=rf"rank-{rank:05d}\.safetensors does not match its checksum"):
            open_checkpoint(tmp_path / "step-1")
        open_checkpoint(tmp_path / "step-1", verify=False)  # another rank has looked
        truncate(path)
        with pytest.raises(UserError, match=rf"rank-{rank:05d}\.safetensors does not match"):
            open_checkpoint(tmp_path / "step-1", verify=False)  # what costs nothing is looked at
        path.write_bytes(good)
    open_checkpoint(tmp_path / "step-1")


def test_a_changed_digit_of_the_index_is_found(tmp_path: Path) -> None:
    index = save_one(tmp_path, 1) / "index.json"
    index.write_text(index.read_text().replace('"step": 1', '"step": 7'))
    with pytest.raises(UserError, match=r"index\.json does not match its checksum"):
        open_checkpoint(tmp_path / "step-1", verify=False)


def test_an_index_of_another_make_is_broken(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 1)
    for content in ("[]", "{}", json.dumps({"files": {"x.safetensors": 3}, "state": {}}), "\xff"):
        (folder / "index.json").write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match="is broken"):
            open_checkpoint(folder)


def test_a_file_of_another_checkpoint_is_not_read_by_mistake(tmp_path: Path) -> None:
    one, two = (save_one(tmp_path, step) / "rank-00000.safetensors" for step in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    two.replace(one)
    with pytest.raises(UserError, match="checksum"):
        open_checkpoint(tmp_path / "step-1")


def test_no_checkpoint_is_no_mistake(tmp_path: Path) -> None:
    assert open_latest(tmp_path, pytest.fail) is None
    assert open_latest(tmp_path / "absent", pytest.fail) is None
    (tmp_path / "step-old").mkdir()
    assert steps(tmp_path) == []


def test_the_newest_is_found_without_the_pointer(tmp_path: Path) -> None:
    """Stopped after the folder has its name, before `latest` says so."""
    for step in (1, 2):
        save_one(tmp_path, step)
    (tmp_path / "latest").write_text("step-1\n")
    saved = open_latest(tmp_path, pytest.fail)
    assert saved is not None and saved.state == {"step": 2}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_one(tmp_path, 1))


def test_another_models_checkpoint(saved: Checkpoint) -> None:
    with pytest.raises(
        UserError, match=r"tensor `a` .*must have the model's shape \[3, 2\], but has \[2, 3\]: "
    ):
        saved.read_into(piece("a", torch.zeros(3, 2)))
    with pytest.raises(UserError, match=r"shape \[4, 3\], but has \[2, 3\]: "):  # a part that would fit
        saved.read_into(Piece("a", (4, 3), (0, 0), torch.zeros(2, 3)))
    with pytest.raises(UserError, match=r"tensor `a` .* dtype torch\.bfloat16, but has torch\.float32: "):
        saved.read_into(piece("a", torch.zeros(2, 3).bfloat16()))
    for read in (saved.read, lambda name: saved.read_into(piece(name, torch.zeros(1)))):
        with pytest.raises(UserError, match="has no tensor `c`: it was made by another model"):
            read("c")
