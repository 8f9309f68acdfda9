"""Preflight: what cannot work is refused before anything starts, and nothing that can is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import BudgetError, DataError, ShardError, TokenizerError
from data_pipeline.shards.manifest import (
    DocumentIndex,
    Manifest,
    PackingRecord,
    RoundTrip,
    ShardRecord,
    SplitRule,
)
from data_pipeline.tokenizer import SentencePieceTokenizer, train_sentencepiece
from parallel.errors import LayoutError
from pretrain.config.changes import may_change
from pretrain.config.compose import compose, known_keys, replace_values, save_config
from pretrain.config.preflight import has_checkpoint, preflight, with_world_size
from pretrain.config.run import Config
from pretrain.errors import ConfigError

TEXT = [
    "the quick brown fox jumps over the lazy dog " * 20,
    "pack my box with five dozen jugs " * 20,
]


def write_manifest(path: Path, tokenizer: SentencePieceTokenizer, **changes: Any) -> Path:
    """A manifest without its shards: preflight never reads those."""
    tokens = changes.get("tokens", 1_000_000)
    members, rest = divmod(tokens, 1 << 20)
    bytes_of_rest = 512 + 2 * rest + -2 * rest % 512 if rest else 0
    values: dict[str, Any] = {
        "split": "train",
        "dtype": "<u2",
        "tokens": tokens,
        "raw_bytes": 4 * tokens,
        "member_tokens": 1 << 20,
        "members_per_shard": members + 1,
        "tokenizer": tokenizer.record,
        "packing": PackingRecord(seed=17),
        "split_rule": SplitRule(validation_below="0028f5c28f5c28f6"),
        "round_trip": RoundTrip(checked=1, failed=0),
        "sources": (),
        "shards": (
            ShardRecord(
                name="a.tar",
                bytes=members * (512 + (2 << 20)) + bytes_of_rest + 1024,
                tokens=tokens,
                first=0,
                sha256="0" * 64,
                xxh3="0" * 32,
                member_xxh3=("0" * 16,) * (members + (rest > 0)),
            ),
        )
        if tokens
        else (),
        "documents": DocumentIndex(count=min(1, tokens), sha256="0" * 64),
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Manifest.model_validate(values).to_json())
    return path


@pytest.fixture(scope="module")
def models() -> list[bytes]:
    return [train_sentencepiece(TEXT, vocab_size=n, num_threads=1) for n in (290, 294)]


@pytest.fixture
def pool(tmp_path: Path, models: list[bytes]) -> Path:
    tokenizer = SentencePieceTokenizer(models[0], "test")
    (tmp_path / "tokenizer.model").write_bytes(models[0])
    (tmp_path / "other.model").write_bytes(models[1])
    write_manifest(tmp_path / "train.json", tokenizer)
    write_manifest(tmp_path / "validation.json", tokenizer, split="validation", tokens=5000)
    return tmp_path


def configuration(pool: Path, *overrides: str) -> Config:
    return compose(
        ["model=tiny", "run.name=r", f"run.root={pool / 'runs'}", f"data.train={pool}/train.json",
         f"data.validation={pool}/validation.json", f"data.tokenizer={pool}/tokenizer.model",
         *overrides]
    )  # fmt: skip


def start(config: Config) -> Config:
    """Leave a run folder as a first start and one checkpoint do."""
    config = preflight(config)
    save_config(config, config.run.path / "config.yaml")
    (config.run.path / "checkpoints" / "step-00000010").mkdir(parents=True)
    return config


class TestData:
    def test_a_good_configuration_passes_and_records_the_time_window(self, pool: Path) -> None:
        config = preflight(configuration(pool, "train.global_batch_size=48"))
        assert config.objective.time_window == 48
        assert config.parallel.data_parallel_size == 1

    def test_a_budget_larger_than_the_pool_names_both(self, pool: Path) -> None:
        preflight(configuration(pool, "data.unique_tokens=1000000"))
        with pytest.raises(BudgetError, match=r"1,000,001 .* 1,000,000 tokens: .*unique_tokens"):
            preflight(configuration(pool, "data.unique_tokens=1000001"))

    def test_a_warm_up_longer_than_the_run_names_both(self, pool: Path) -> None:
        """1,000,000 tokens are 977 sequences, or 4 steps of 256; of two epochs 8."""
        preflight(configuration(pool, "optimizer.schedule.warmup=8", "data.epochs=2"))
        with pytest.raises(ConfigError, match=r"warmup 9 steps .* run of 8 steps \(1,954 seq"):
            preflight(configuration(pool, "optimizer.schedule.warmup=9", "data.epochs=2"))

    def test_missing_manifest_and_tokenizer(self, pool: Path) -> None:
        with pytest.raises(ShardError, match=r"no manifest at .*epochal data prepare"):
            preflight(configuration(pool, f"data.train={pool}/nowhere.json"))
        with pytest.raises(TokenizerError, match=r"cannot read data\.tokenizer"):
            preflight(configuration(pool, f"data.tokenizer={pool}/nowhere.model"))

    def test_splits_are_not_mixed_up(self, pool: Path) -> None:
        with pytest.raises(ShardError, match=r"data\.validation names the train split"):
            preflight(configuration(pool, f"data.validation={pool}/train.json"))
        with pytest.raises(ShardError, match=r"data\.train names the validation split"):
            preflight(configuration(pool, f"data.train={pool}/validation.json"))

    def test_the_wrong_tokenizer_for_the_shards(self, pool: Path) -> None:
        with pytest.raises(TokenizerError, match=r"294 ids.*is not the one.*290 ids"):
            preflight(configuration(pool, f"data.tokenizer={pool}/other.model"))
        (pool / "broken.model").write_bytes(b"nonsense")
        with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
            preflight(configuration(pool, f"data.tokenizer={pool}/broken.model"))

    def test_pools_that_were_not_prepared_together(self, pool: Path, models: list[bytes]) -> None:
        same, other = (SentencePieceTokenizer(model, "test") for model in models)
        path = pool / "v2.json"
        write_manifest(path, other, split="validation")
        with pytest.raises(ShardError, match="different tokenizers"):
            preflight(configuration(pool, f"data.validation={path}"))
        write_manifest(path, same, split="validation", split_rule=SplitRule(validation_below="1"))
        with pytest.raises(ShardError, match="documents may be in both"):
            preflight(configuration(pool, f"data.validation={path}"))


class TestMix:
    @pytest.fixture
    def mix(self, pool: Path, models: list[bytes]) -> Path:
        write_manifest(pool / "second.json", SentencePieceTokenizer(models[0], "test"), tokens=2000)
        return self.write(pool, [{"name": "a", "manifest": "train.json", "unique_tokens": 7000},
                                 {"name": "b", "manifest": "second.json"}])  # fmt: skip

    def write(self, pool: Path, sources: list[dict[str, Any]], name: str = "mix.json") -> Path:
        content = {"format": "mixture/1", "mode": "proportional", "sources": sources}
        (pool / name).write_text(json.dumps(content))
        return pool / name

    def test_every_source_is_checked(self, pool: Path, models: list[bytes], mix: Path) -> None:
        preflight(configuration(pool, f"data.train={mix}"))
        write_manifest(pool / "second.json", SentencePieceTokenizer(models[1], "test"))
        with pytest.raises(ShardError, match=r"different tokenizers.*second\.json"):
            preflight(configuration(pool, f"data.train={mix}"))
        self.write(pool, [{"name": "a", "manifest": "train.json", "unique_tokens": 1_000_001}])
        with pytest.raises(BudgetError, match=r"1,000,001 .* 1,000,000 tokens.*train\.json"):
            preflight(configuration(pool, f"data.train={mix}"))
        self.write(pool, [{"name": "a", "manifest": "validation.json"}])
        with pytest.raises(ShardError, match="names the validation split"):
            preflight(configuration(pool, f"data.train={mix}"))

    def test_budgets_stand_in_the_mix_and_validation_is_one_pool(
        self, pool: Path, mix: Path
    ) -> None:
        with pytest.raises(BudgetError, match=r"data\.unique_tokens to null"):
            preflight(configuration(pool, f"data.train={mix}", "data.unique_tokens=5000"))
        with pytest.raises(DataError, match=r"data\.validation .* is a mix"):
            preflight(configuration(pool, f"data.validation={mix}"))

    def test_a_mix_may_move_but_not_change(self, pool: Path, mix: Path) -> None:
        start(configuration(pool, f"data.train={mix}"))
        sources = json.loads(mix.read_text())["sources"]
        moved = self.write(pool, sources, "moved.json")
        preflight(configuration(pool, f"data.train={moved}"))
        sources[0]["unique_tokens"] = 7001
        self.write(pool, sources, "moved.json")
        with pytest.raises(ConfigError, match=r"data\.train: .*other content"):
            preflight(configuration(pool, f"data.train={moved}"))


class TestUrl:
    @pytest.fixture
    def server(self, pool: Path) -> Iterator[str]:
        handler = partial(SimpleHTTPRequestHandler, directory=pool)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
            threading.Thread(target=httpd.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
            httpd.shutdown()

    def test_manifests_behind_urls(self, pool: Path, server: str) -> None:
        """They are kept as they are, and a run may move between a folder and a server."""
        urls = (f"data.train={server}/train.json", f"data.validation={server}/validation.json")
        start(configuration(pool))
        config = preflight(configuration(pool, *urls))
        assert config.data.train == f"{server}/train.json"
        save_config(config, pool / "config.yaml")
        assert compose([], pool / "config.yaml") == config
        with pytest.raises(ShardError, match=r"no manifest at http.*404"):
            preflight(configuration(pool, f"data.train={server}/nowhere.json"))

    def test_schemes(self, pool: Path) -> None:
        for url in ("s3://bucket/train/manifest.json", "https://host/manifest.json"):
            assert configuration(pool, f"data.train={url}").data.train == url
        with pytest.raises(ConfigError, match=r"data\.train: .*'ftp://host/x'.*http, https, s3"):
            configuration(pool, "data.train=ftp://host/x")


class TestWorldSize:
    def test_ranks_of_a_hostfile_and_of_slurm(self, pool: Path) -> None:
        (pool / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
        config = configuration(
            pool, f"parallel.hostfile={pool}/hosts", "parallel.tensor_parallel_size=2"
        )
        assert with_world_size(config).parallel.data_parallel_size == 2
        assert with_world_size(config, 8).world_size == 8

    def test_ranks_that_the_layout_cannot_use(self, pool: Path) -> None:
        config = configuration(pool, "parallel.tensor_parallel_size=4")
        with pytest.raises(LayoutError, match="does not divide the 6 ranks"):
            with_world_size(config, 6)
        config = configuration(pool, "parallel.data_parallel_size=2")
        with pytest.raises(LayoutError, match=r"= 2 ranks, but there are 4; .* set it to 4"):
            with_world_size(config, 4)

    def test_the_batch_is_checked_against_the_ranks_found(self, pool: Path) -> None:
        config = configuration(pool, "train.global_batch_size=10")
        with pytest.raises(ConfigError, match=r"global_batch_size 10 is not divisible by .* 4"):
            preflight(config, 4)

    def test_illegal_layouts_are_refused_without_a_process_group(self, pool: Path) -> None:
        with pytest.raises(ConfigError, match=r"needs parallel\.zero_stage 1, not 3"):
            configuration(pool, "parallel.pipeline_parallel_size=2", "parallel.zero_stage=3")


class TestResume:
    @pytest.mark.parametrize(
        "change",
        ["data.epochs=40", "train.global_batch_size=64", "train.stop_step=3",
         "train.log_interval=1",
         "optimizer.schedule.name=wsd", "parallel.data_parallel_size=2", "parallel.zero_stage=2",
         "tracking.mlflow=false", "evaluation.draws=9", "train.eval_epochs=[1,2]",
         "train.precision=bfloat16",
         "data.verify=size", "data.cache=/tmp/c", "data.cache_bytes=9"],
    )  # fmt: skip
    def test_what_may_change(self, pool: Path, change: str) -> None:
        start(configuration(pool))
        assert preflight(configuration(pool, change)).objective.time_window == 256

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ("run.seed=18", "run.seed: the run has 17, given 18"),
            ("model.num_layers=5", "model.num_layers: the run has 4, given 5"),
            ("objective=masked", "objective.name: the run has 'autoregressive', given 'masked'"),
            ("data.unique_tokens=5000", "data.unique_tokens: the run has None, given 5000"),
            ("data.seq_length=512", "data.seq_length: the run has 1024, given 512"),
            ("optimizer.lr=1", "optimizer.lr: the run has 0.0003, given 1.0"),
            (
                "run.init_from=w.safetensors",
                f"run.init_from: the run has None, given {str(Path('w.safetensors').absolute())!r}",
            ),
            ("objective.time_window=8", "objective.time_window: the run has 256, given 8"),
        ],
    )
    def test_what_may_not(self, pool: Path, change: str, line: str) -> None:
        start(configuration(pool))
        with pytest.raises(ConfigError) as caught:
            preflight(configuration(pool, change))
        lines = [text.strip() for text in str(caught.value).splitlines()]
        assert lines[1:-1] == [line]

    def test_how_a_run_is_executed_is_free_and_what_it_computes_is_fixed(self) -> None:
        free = {key for key in known_keys() if may_change(key)}
        assert {k for k in known_keys() if k.startswith(("parallel.", "tracking."))} <= free
        fixed = set(known_keys()) - free
        sections = {"run", "data", "model", "objective", "optimizer"}
        assert {k.split(".")[0] for k in fixed} == sections
        branch = {"run.branch_from", "run.branch_sha256"}
        assert {k for k in fixed if k.startswith("run.")} == {"run.seed", "run.init_from", *branch}

    def test_only_another_warm_up_is_compared_with_the_length_of_the_run(self, pool: Path) -> None:
        """The ranks know how long that of the first start is, in sequences."""
        start(configuration(pool, "optimizer.schedule.warmup=4"))
        larger = "train.global_batch_size=512"
        preflight(configuration(pool, "optimizer.schedule.warmup=4", larger))
        with pytest.raises(ConfigError, match=r"warmup 3 steps .* run of 2 steps"):
            preflight(configuration(pool, "optimizer.schedule.warmup=3", larger))

    def test_a_folder_without_checkpoints_is_free(self, pool: Path) -> None:
        config = start(configuration(pool))
        (config.run.path / "checkpoints" / "step-00000010").rmdir()
        assert not has_checkpoint(config.run.path)
        assert preflight(configuration(pool, "run.seed=18")).run.seed == 18

    def test_pools_may_move_but_not_change(self, pool: Path, models: list[bytes]) -> None:
        start(configuration(pool))
        moved = pool / "moved.json"
        moved.write_bytes((pool / "train.json").read_bytes())
        preflight(configuration(pool, f"data.train={moved}"))
        write_manifest(moved, SentencePieceTokenizer(models[0], "test"), tokens=2_000_000)
        with pytest.raises(ConfigError, match=r"data\.train: .*other content"):
            preflight(configuration(pool, f"data.train={moved}"))

    def test_a_configuration_of_another_version(self, pool: Path) -> None:
        config = start(configuration(pool))
        saved = config.run.path / "config.yaml"
        saved.write_text(saved.read_text() + "retired: 1\n")
        with pytest.raises(ConfigError, match="does not fit this version"):
            preflight(configuration(pool))

    def test_repeating_from_the_saved_file_is_the_same_configuration(self, pool: Path) -> None:
        config = start(configuration(pool))
        assert preflight(compose([], config.run.path / "config.yaml")) == config


@pytest.mark.parametrize("uri", ["file:///data/mlruns", "file:/data/mlruns", "mlruns"])
def test_a_store_of_plain_files_is_refused(pool: Path, uri: str) -> None:
    """The installed MLflow loses every measurement there; a saved configuration can be read."""
    config = configuration(pool, f"tracking.uri={uri}", "tracking.mlflow=true")
    with pytest.raises(ConfigError, match=r"sqlite:////.*/mlruns/mlflow\.db"):
        preflight(config)
    for other in ("databricks", "sqlite:///mlflow.db", "http://localhost:5000"):
        preflight(replace_values(config, {"tracking.uri": other}))


def test_replace_values_validates(pool: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.epochs"):
        replace_values(configuration(pool), {"data.epochs": 0})
