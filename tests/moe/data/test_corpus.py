import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data import corpus as module
from moe.data.corpus import Corpus, prepare
from moe.data.shards import Manifest, TokenShards
from parallel.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    rows = [{"text": f"document {n} " * (n + 1), "domain": "odd" if n % 2 else "even"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), cache=str(tmp_path / "cache"), validation_fraction=0.2
    )


def texts(corpus: Corpus, shards: TokenShards) -> list[str]:
    read = (shards.read(n, 0, int(length)) for n, length in enumerate(shards.lengths))
    return [corpus.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) for tokens in read]


def entries(config: DataConfig) -> list[str]:
    return sorted(os.listdir(config.cache))


def build(config: DataConfig, vocab_size: int = 300) -> tuple[Corpus, bool]:
    """The corpus, and whether it was built rather than found."""
    said: list[str] = []
    return prepare(config, vocab_size, said.append), bool(said)


def test_everything_comes_back_with_its_domain(config: DataConfig) -> None:
    corpus, built = build(config)
    assert built and corpus.eos == 1 and corpus.domains == ("even", "odd")
    found = texts(corpus, corpus.train) + texts(corpus, corpus.validation)
    assert sorted(found) == sorted(f"document {n} " * (n + 1) + "<eos>" for n in range(20))
    assert 0 < len(corpus.validation.lengths) < len(corpus.train.lengths)
    for text, domain in zip(texts(corpus, corpus.train), corpus.train.domains, strict=True):
        assert corpus.domains[domain] == ("odd" if int(text.split()[1]) % 2 else "even")


def test_second_time_is_found_and_any_setting_that_matters_builds_anew(config: DataConfig) -> None:
    build(config)
    assert not build(config)[1]
    assert not build(dataclasses.replace(config, sequence_length=7, mask_documents=True))[1]
    path = Path(config.paths[0])
    os.utime(path, ns=(0, 0))
    assert build(config)[1] and build(config, 301)[1]
    assert build(dataclasses.replace(config, validation_fraction=0.3))[1]
    assert build(dataclasses.replace(config, domain_key="other"))[1]
    assert build(dataclasses.replace(config, text_key="domain"))[1]
    path.write_text(path.read_text() + path.read_text().splitlines()[0])
    assert build(config)[1]


def test_building_twice_gives_the_same_files(config: DataConfig, tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        cache = tmp_path / name
        build(dataclasses.replace(config, cache=str(cache)))
        folders.append({file.name: file.read_bytes() for file in cache.glob("*/*")})
    assert folders[0] == folders[1] and len(folders[0]) == 6


def test_given_tokenizer_is_used_and_belongs_to_the_fingerprint(config: DataConfig, tmp_path: Path) -> None:
    corpus, _ = build(config)
    own = tmp_path / "own.json"
    own.write_text(corpus.tokenizer.to_str().replace("<eos>", "</s>"))
    given = dataclasses.replace(config, tokenizer=str(own))
    opened, built = build(given)
    assert built and texts(opened, opened.train)[0].endswith("</s>")
    assert np.array_equal(opened.train.lengths, corpus.train.lengths)
    own.write_text(own.read_text().replace("</s>", "<|endoftext|>"))
    assert build(given)[1]
    with pytest.raises(UserError, match=r"^`model.vocab_size` must hold every token of `data.tokenizer`"):
        build(given, 200)


def test_damaged_entry_is_built_again(config: DataConfig) -> None:
    before, _ = build(config)
    expected = texts(before, before.train)
    tokens = before.tokenizer_path.parent / "tokens-00000.bin"
    os.truncate(tokens, tokens.stat().st_size - 2)
    after, built = build(config)
    assert built and texts(after, after.train) == expected
    assert not build(config)[1] and len(entries(config)) == 1


def test_interrupted_preparation_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path, *arguments: object, **settings: object) -> None:
        (folder / "tokens-00000.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_shards", interrupt)
        build(config)
    assert entries(config) == []
    (Path(config.cache) / ".building-killed").mkdir()  # what a killed process leaves
    assert build(config)[1]


def test_the_slower_of_two_uses_the_other_s(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module.write_shards

    def overtaken(*arguments: Any, **settings: Any) -> Manifest:
        monkeypatch.setattr(module, "write_shards", write)
        winners.append(build(config)[0].tokenizer_path.stat().st_ino)
        return write(*arguments, **settings)

    winners: list[int] = []
    monkeypatch.setattr(module, "write_shards", overtaken)
    corpus, _ = build(config)
    assert [corpus.tokenizer_path.stat().st_ino] == winners
    assert len(entries(config)) == 1


def test_processes_at_once(config: DataConfig) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(prepare, [(config, 300)] * 3)
    assert len({corpus.tokenizer_path for corpus in results}) == 1 and len(entries(config)) == 1
    assert not build(config)[1]


def test_cache_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        build(dataclasses.replace(config, cache=str(tmp_path / "file")))
    assert str(caught.value) == (
        f"`data.cache` must be a folder that can be written, but {tmp_path / 'file'} is not (File exists): "
        "change its permissions or name another"
    )


def test_preparing_needs_no_torch(config: DataConfig) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from moe.config import DataConfig; from moe.data.corpus import prepare\n"
        f"print(prepare(DataConfig(paths={config.paths!r}, cache={config.cache!r}), 300).train.num_tokens)"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout) > 0, result.stderr


def test_part_of_the_standard_library(tmp_path: Path) -> None:
    library = Path(json.__file__).parents[1]
    paths = tuple(str(library / name) for name in ("json", "email", "asyncio", "http", "logging", "xml"))
    corpus, _ = build(DataConfig(paths=paths, cache=str(tmp_path)), 1000)
    assert corpus.train.num_tokens + corpus.validation.num_tokens > 300_000
    assert {"decoder", "mime", "etree", "handlers"} <= set(corpus.domains)
