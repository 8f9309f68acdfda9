"""`epochal plan`: what it answers, what it refuses, and the ladder of models in its documents."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import pretrain.cli.main as cli
from parallel.errors import LayoutError
from parallel.planner.machine import GIB
from pretrain.config.compose import compose
from pretrain.config.groups import CONFIG_ROOT, groups
from pretrain.config.objectives import objectives
from pretrain.config.run import Config, ModelConfig
from pretrain.errors import ConfigError
from pretrain.model.size import parameter_count
from pretrain.planning.ladder import (
    HEADER,
    LENGTH,
    VOCABULARY,
    ladder_config,
    ladder_table,
    tabled_models,
)
from pretrain.planning.machines import load_machine, machine_names, sized
from pretrain.planning.plan import costs, plan
from pretrain.planning.remedies import overrides
from pretrain.planning.report import to_dict
from pretrain.planning.tables import sections
from pretrain.study.flops import train_flops_per_token

DATA = ["data.train=a", "data.validation=b", "data.tokenizer=nowhere/t.model"]
MODELS = groups()["model"]
MACHINES = machine_names()


def config(*changes: str) -> Config:
    return compose(["model=small", "train.precision=bfloat16", *changes, *DATA])


class TestCosts:
    @pytest.mark.parametrize("conditioned", [False, True])
    @pytest.mark.parametrize("name", MODELS)
    def test_parameters_are_those_of_the_model(self, name: str, conditioned: bool) -> None:
        given = ladder_config(name)
        changed = given.model.model_copy(update={"time_conditioning": conditioned})
        given = given.model_copy(update={"model": changed})
        padded = changed.padded_vocab_size(VOCABULARY)
        assert costs(given, VOCABULARY).parameters == parameter_count(changed, padded)

    def test_convolutions_are_counted_and_their_layouts_found(self) -> None:
        kernels = ("model.short_convolution=0", "model.short_convolution=5")
        given = [config("objective=masked", "train.micro_batch_size=8", k) for k in kernels]
        plain, convolved = (plan(each, vocab_size=1000) for each in given)
        m = given[1].model
        more = m.num_layers * 2 * 5 * m.hidden_size
        assert convolved.model.parameters - plain.model.parameters == more
        assert convolved.model.parameters == parameter_count(m, m.padded_vocab_size(1000))
        assert convolved.model.flops_per_token - plain.model.flops_per_token == 6 * more
        assert convolved.given.memory.activations > plain.given.memory.activations
        assert convolved.given.time.compute > plain.given.time.compute
        layouts = [found.candidate.layout for found in convolved.found.fitting]
        assert all(one.context_parallel_size == 1 and not one.sequence_parallel for one in layouts)
        assert any(one.tensor_parallel_size > 1 for one in layouts)

    @pytest.mark.parametrize("objective", objectives.names())
    def test_every_objective_is_planned_in_layouts_that_it_allows(self, objective: str) -> None:
        given = config(f"objective={objective}")
        planned, limits = plan(given, vocab_size=1000), given.objective.layouts
        assert planned.found.fitting
        for found in planned.found.fitting:
            layout = found.candidate.layout
            assert limits.pipeline or layout.pipeline_parallel_size == 1
            assert limits.context or layout.context_parallel_size == 1
            assert found.candidate.zero_stage <= limits.largest_zero_stage
        assert planned.model.flops_per_token > 0

    def test_block_diffusion_takes_two_positions_a_token(self) -> None:
        one, two = (
            plan(config(f"objective={name}", "train.micro_batch_size=8"), vocab_size=1000)
            for name in ("masked", "block")
        )
        ratio = two.given.memory.activations / one.given.memory.activations
        assert 1.9 < ratio < 2.1
        assert two.given.time.compute > 1.8 * one.given.time.compute

    def test_the_average_and_recomputation_are_seen(self) -> None:
        plain = plan(config("train.micro_batch_size=8")).given.memory
        changed = plan(
            config("train.micro_batch_size=8", "train.ema_decay=0.999", "train.recompute=full")
        ).given.memory
        assert changed.state.averages == pytest.approx(changed.state.optimizer / 3, rel=1e-6)
        assert changed.activations < plain.activations / 3
        assert changed.activations_without_recompute == plain.activations


class TestAnswer:
    def test_recommended_overrides_give_the_recommended_plan(self) -> None:
        """What is printed can be pasted: planned as given, it is the same plan."""
        base = [*DATA, "model=10b", "train.precision=bfloat16", "data.seq_length=2048"]
        first = plan(compose(base), machine="h100x64")
        best = first.found.fitting[0]
        again = plan(compose([*base, *overrides(best)]), machine="h100x64").given
        assert again.candidate == best.candidate
        assert again.time == best.time

    def test_tokens_days_and_cost(self) -> None:
        planned = plan(config(), tokens=3e11, price=2.0)
        answer = to_dict(planned, 3)
        given = answer["given"]
        assert given["days"] == pytest.approx(3e11 / given["tokens_per_day"])
        assert given["gpu_hours"] == pytest.approx(given["days"] * 24 * 8)
        assert given["cost"] == pytest.approx(2 * given["gpu_hours"])
        assert len(answer["best"]) == 3
        json.dumps(answer)

    def test_a_layout_that_does_not_fit_says_what_it_lacks(self) -> None:
        text = str(sections(plan(config("model=13b")), 3))
        assert "DOES NOT FIT" in text
        assert "lack memory" in text

    def test_the_least_change_that_fits_is_given(self) -> None:
        """One setting where one is enough: planned with it, the run fits."""
        planned = plan(config("model=1.7b"))
        (remedy,) = planned.remedies
        assert not planned.given.fits
        assert re.fullmatch(r"train\.micro_batch_size=\d+", remedy.change)
        again = plan(config("model=1.7b", remedy.change))
        assert again.given.fits
        assert again.given.candidate == remedy.plan.candidate
        assert again.remedies == ()
        assert remedy.change in str(sections(planned, 3))

    def test_where_nothing_fits_other_machines_and_offloading_are_tried(self) -> None:
        """Each remedy holds when it is planned, and half of the GPUs would not do."""
        planned = plan(config("model=13b"), num_gpus=2)
        assert planned.found.fitting == ()
        offload, gpus, machine = (remedy.change for remedy in planned.remedies)
        again = plan(config("model=13b", *offload.split()), num_gpus=2)
        assert again.given.fits
        assert again.given.candidate.offload == "cpu"
        number = int(gpus.removeprefix("--gpus "))
        assert plan(config("model=13b"), num_gpus=number).found.fitting
        assert not plan(config("model=13b"), num_gpus=number // 2).found.fitting
        name = machine.removeprefix("--machine ").removesuffix(" --gpus 2")
        assert plan(config("model=13b"), machine=name, num_gpus=2).found.fitting
        titles = [part.title for part in sections(planned, 3)]
        assert "No layout fits these GPUs; these changes fit" in titles
        assert len(to_dict(planned, 3)["remedies"]) == 3

    def test_a_layout_with_memory_to_spare_comes_before_its_equals(self) -> None:
        planned = plan(
            config("model=70b", "train.global_batch_size=1024", "data.seq_length=4096"),
            machine="h100x64",
        )
        best = planned.found.fitting[0]
        level = [p for p in planned.found.fitting if p.time.total < 1.03 * best.time.total]
        assert any(plan.tight for plan in level)
        assert not best.tight

    def test_offloading_is_shown_where_it_is_asked_for(self) -> None:
        offload = ("parallel.offload=cpu", "parallel.zero_stage=2", "train.micro_batch_size=4")
        planned = plan(config("model=7b", *offload))
        given = to_dict(planned, 1)["given"]
        assert given["memory"]["host_of_a_node"] == 8 * given["memory"]["host"]
        assert given["seconds"]["offload"] > 0
        assert "parallel.offload=cpu" in overrides(planned.found.fitting[0])
        text = str(sections(planned, 1))
        assert "host memory of a node" in text
        assert "offloading" in text

    def test_thousands_of_ranks(self) -> None:
        planned = plan(
            config("model=70b", "train.global_batch_size=4096"), machine="h100x512", num_gpus=4096
        )
        assert planned.found.fitting[0].candidate.layout.world_size == 4096

    def test_an_assumed_vocabulary_is_said(self) -> None:
        assert "assumed" in str(sections(plan(config()), 1))
        assert "assumed" not in str(sections(plan(config(), vocab_size=50_257), 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "h100x9"], "unknown machine 'h100x9'; did you mean h100x8? known: a100x8"),
        (["--gpus", "12"], "nodes of 8: take 1 to 8 or a multiple of 8"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--tokens", "many"], "--tokens is 'many'; write a number, e.g. 300B"),
        (["--tokens", "0"], "--tokens is 0; it must be larger than 0"),
        (["--price-per-gpu-hour", "-1"], "--price-per-gpu-hour is -1"),
        (["--vocab-size", "3"], "--vocab-size is 3; it must be 8 or more"),
        (["--top", "-1"], "--top is -1"),
        (["modle=small"], "unknown key modle; did you mean model"),
        (["machine=h100x8"], "unknown key machine"),
        (["objective.name=maskd"], "unknown objective"),
        (["parallel.tensor_parallel_size=16"], "does not divide"),
        (["parallel.pipeline_parallel_size=3"], "does not divide the 8 ranks"),
        (
            ["parallel.pipeline_parallel_size=2", "parallel.zero_stage=2"],
            "needs parallel.zero_stage 1",
        ),
        (["train.global_batch_size=12"], "12 is not divisible by the 8 data-parallel ranks"),
        (["train.micro_batch_size=64"], "micro_batch_size 64 does not divide the 32 sequences"),
    ],
)
def test_mistakes_are_refused_with_help(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["epochal", "plan", *arguments, *DATA])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


class TestMachines:
    @pytest.mark.parametrize("name", MACHINES)
    def test_packaged(self, name: str) -> None:
        machine = load_machine(name)
        assert machine.name == name
        assert machine.num_gpus == int(name.partition("x")[2])

    def test_part_of_a_node_and_more_nodes(self) -> None:
        node = load_machine("h100x8")
        assert sized(node, 2).num_gpus == sized(node, 2).gpus_per_node == 2
        assert sized(node, 64).num_nodes == 8

    def test_a_file_of_ones_own(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        values = yaml.safe_load((CONFIG_ROOT / "machine/h100x8.yaml").read_text())
        path.write_text(yaml.safe_dump({**values, "memory_gib": 40}))
        assert load_machine(str(path)).memory_gib == 40
        path.write_text("- a\n")
        with pytest.raises(ConfigError, match="is not a mapping"):
            load_machine(str(path))
        path.write_text("name: [")
        with pytest.raises(ConfigError, match="cannot read"):
            load_machine(str(path))
        path.write_text(yaml.safe_dump({**values, "memory": 40}))
        with pytest.raises(LayoutError, match="unknown key 'memory'"):
            load_machine(str(path))


class TestLadder:
    @pytest.mark.parametrize("name", MODELS)
    def test_numbers_in_the_file(self, name: str) -> None:
        """The comment above each shape: parameters and operations, as counted."""
        text = (CONFIG_ROOT / "model" / f"{name}.yaml").read_text()
        without, total = (
            float(re.search(rf"([\d,.]+) M {after}", text)[1].replace(",", ""))  # type: ignore[index]
            for after in ("without embeddings", "with a vocabulary of 32,000")
        )
        m = ModelConfig(**yaml.safe_load(text))
        padded = m.padded_vocab_size(VOCABULARY)
        count = parameter_count(m, padded)
        matrices = padded * m.hidden_size * (1 if m.tie_embeddings else 2)
        assert total == round(count / 1e6, 2)
        assert without == round((count - matrices) / 1e6, 2)
        stated = [
            float(re.search(rf"([\d.]+) {kind}", text)[1])  # type: ignore[index]
            for kind in ("autoregressive", "masked")
        ]
        counted = [
            train_flops_per_token(m, padded, LENGTH, causal=causal, head_share=share) / 1e9
            for causal, share in ((True, 1.0), (False, 0.5))
        ]
        assert stated == pytest.approx(counted, rel=1e-3)

    def test_shapes_of_the_papers(self) -> None:
        """Parameters without embeddings as the papers count them."""
        counted = {
            name: costs(ladder_config(name), VOCABULARY).non_embedding_parameters / 1e9
            for name in ("1.7b", "2.1b", "3b", "10b")
        }
        # 12 d^2 a layer for 28 layers of 2176; table 5 of arXiv 2507.15857; arXiv 2512.10858.
        want = {"1.7b": 1.591, "2.1b": 2.0389, "3b": 2.04, "10b": 8.67}
        assert counted == pytest.approx(want, rel=2e-3)

    def test_it_reaches_from_a_million_to_seventy_billion(self) -> None:
        sizes = [costs(ladder_config(n), VOCABULARY).non_embedding_parameters for n in MODELS]
        steps = sorted(sizes)
        assert steps[0] < 1e6
        assert steps[-1] > 68e9
        assert all(b / a < 3.3 for a, b in pairwise(steps[:-1]))

    @pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
    def test_the_table_of_the_documents_is_what_the_command_prints(self, every: int) -> None:
        """Regenerate it with `epochal plan --models` when sizes or the planner change."""
        page = CONFIG_ROOT.parent / "docs" / "planning.md"
        if not page.exists():
            pytest.skip("installed without the documents")
        lines = page.read_text().splitlines()
        first = lines.index(HEADER.splitlines()[0])
        tabled = tabled_models()
        rows = lines[first + 2 : first + 2 + len(tabled)]
        names = [re.search(r"`(.+?)`", row)[1] for row in rows]  # type: ignore[index]
        assert sorted(names) == tabled
        models = names[::every]
        table = "\n".join([HEADER, *rows[::every]])
        assert ladder_table(models) == table

    @pytest.mark.parametrize("machine", ["h200x8", "h200x64"])
    def test_what_fits_h100_fits_h200(self, machine: str) -> None:
        small = load_machine(machine.replace("200", "100"))
        large = load_machine(machine)
        assert large.usable_bytes > small.usable_bytes + 50 * GIB
        assert large.num_gpus == small.num_gpus
