from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    GroupPooling,
    MaxAge,
    ModelShape,
    PolicyFile,
    Ranking,
    Selection,
    known_kinds,
    written_by,
)

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def file(model: ModelShape) -> PolicyFile:
    return PolicyFile(
        BudgetConstrained(MaxAge(CosineThreshold(((0.1, 0.2, 1 / 3), (0.4, 0.5, 0.6))), 30), 0.1, burst=1),
        Selection(64, sinks=2, window=8, group=GroupPooling.MEAN, ranking=Ranking.UPDATED),
        model,
        {"traces": ["sha256:abc"], "budget": 0.1, "replay": {"lost_mass": 0.02}},
    )


class TestWriteAndRead:
    def test_a_file_comes_back_equal(self, file: PolicyFile, tmp_path: Path) -> None:
        file.write(tmp_path / "policy.json")
        assert PolicyFile.read(tmp_path / "policy.json") == file
        assert PolicyFile.read(str(tmp_path / "policy.json")) == file

    def test_the_file_is_plain_json_with_the_designed_keys(self, file: PolicyFile, tmp_path: Path) -> None:
        file.write(tmp_path / "policy.json")
        values = json.loads((tmp_path / "policy.json").read_text(encoding="utf-8"))
        assert list(values) == ["format", "policy", "selection", "model", "horizon_steps", "provenance", "digest"]
        assert values["format"] == 2
        assert values["selection"]["group"] == "mean"
        assert values["model"] == {"id": "tiny", "layers": 2, "kv_heads": 3, "query_heads": 6, "head_dim": 8}

    def test_a_file_that_was_edited_says_so_and_is_read(self, file: PolicyFile, tmp_path: Path) -> None:
        path = tmp_path / "policy.json"
        file.write(path)
        values = json.loads(path.read_text(encoding="utf-8"))
        values["selection"]["k"] = 65
        path.write_text(json.dumps(values))
        with pytest.warns(UserWarning, match="its values do not match its digest"):
            assert PolicyFile.read(path).selection.k == 65
        # As the sentence says.
        del values["digest"]
        assert PolicyFile.from_json(values).selection.k == 65

    def test_keys_that_are_no_texts_become_texts(self, file: PolicyFile, tmp_path: Path) -> None:
        odd = dataclasses.replace(file, provenance={2: "two", 10: ("a", {3: "b"})})
        odd.write(tmp_path / "policy.json")
        assert PolicyFile.read(tmp_path / "policy.json").provenance == {"2": "two", "10": ["a", {"3": "b"}]}

    def test_another_order_or_layout_is_no_edit(self, file: PolicyFile, tmp_path: Path) -> None:
        path = tmp_path / "policy.json"
        file.write(path)
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(dict(reversed(values.items())), indent=7))
        assert PolicyFile.read(path) == file

    def test_what_has_a_default_may_be_left_out(self, file: PolicyFile) -> None:
        values = file.to_json() | {"selection": {"k": 64}}
        del values["provenance"], values["horizon_steps"]
        loaded = PolicyFile.from_json(values)
        assert (loaded.selection, loaded.provenance, loaded.horizon_steps) == (Selection(64), {}, None)

    def test_sizes_of_units_come_back_equal(self, file: PolicyFile, tmp_path: Path) -> None:
        sized = dataclasses.replace(file, selection=Selection(64, unit_k=((36, 64, 92), (40, 50, 60))))
        sized.write(tmp_path / "policy.json")
        assert PolicyFile.read(tmp_path / "policy.json") == sized
        assert PolicyFile.from_json(sized.to_json()) == sized

    def test_writing_over_a_file_leaves_nothing_beside_it(self, file: PolicyFile, tmp_path: Path) -> None:
        path = tmp_path / "policy.json"
        path.write_text("old")
        file.write(path)
        assert PolicyFile.read(path) == file
        assert os.listdir(tmp_path) == ["policy.json"]

    def test_the_place_of_the_file_never_holds_half_of_it(
        self, file: PolicyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "policy.json"
        path.write_text("old")
        renamed = []

        def replace(source: Path, target: Path) -> None:
            assert target.read_text() == "old"
            assert PolicyFile.read(source) == file
            renamed.append((source.parent, target))

        monkeypatch.setattr(os, "replace", replace)
        file.write(path)
        assert renamed == [(tmp_path, path)]

    def test_provenance_that_is_no_json_leaves_the_old_file_and_nothing_beside_it(
        self, file: PolicyFile, tmp_path: Path
    ) -> None:
        path = tmp_path / "policy.json"
        path.write_text("old")
        with pytest.raises(TypeError, match="not JSON serializable"):
            dataclasses.replace(file, provenance={"array": object()}).write(path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["policy.json"]


class TestHorizon:
    def test_a_file_says_for_how_long_outputs_it_was_tuned(self, file: PolicyFile, tmp_path: Path) -> None:
        dataclasses.replace(file, horizon_steps=512).write(tmp_path / "policy.json")
        assert PolicyFile.read(tmp_path / "policy.json").horizon_steps == 512

    @pytest.mark.parametrize("horizon_steps", [0, -1])
    def test_a_horizon_of_no_steps_is_refused(self, file: PolicyFile, horizon_steps: int) -> None:
        with pytest.raises(ValueError, match=f"horizon_steps must be at least 1 step, not {horizon_steps}"):
            dataclasses.replace(file, horizon_steps=horizon_steps)

    def test_format_1_has_it_among_its_results(self) -> None:
        values = json.loads((RESULTS / "policy-budget-0.1.json").read_text(encoding="utf-8"))
        assert values["format"] == 1
        assert PolicyFile.from_json(values).horizon_steps == values["provenance"]["closed_loop"]["steps"] == 64
        for closed_loop in (None, {}, {"steps": "64"}, {"steps": 0}, [64]):
            changed = values | {"provenance": {"closed_loop": closed_loop}}
            assert PolicyFile.from_json(changed).horizon_steps is None


class TestWriter:
    def test_a_file_says_which_version_wrote_it(self, file: PolicyFile, tmp_path: Path) -> None:
        file.write(tmp_path / "policy.json")
        values = json.loads((tmp_path / "policy.json").read_text(encoding="utf-8"))
        assert values["provenance"] == {**file.provenance, "written_by": written_by()}
        assert PolicyFile.read(tmp_path / "policy.json").written_by == written_by()

    def test_a_file_keeps_its_writer_when_it_is_copied(self, file: PolicyFile) -> None:
        values = dataclasses.replace(file, written_by="recycled-attention 7.0").to_json()
        copy = PolicyFile.from_json(values)
        assert (copy.written_by, copy.to_json()) == ("recycled-attention 7.0", values)
        assert copy == file

    def test_a_file_from_before_the_writer_was_named_still_loads(self) -> None:
        path = RESULTS / "policy-budget-0.1.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        assert "written_by" not in values["provenance"]
        file = PolicyFile.read(path)
        assert file.written_by is None
        assert file.to_json()["provenance"] == values["provenance"]


def refused(sentence: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(sentence)}$")


UNKNOWN = f"unknown policy kind 'nope': known are {', '.join(known_kinds())}."


class TestRefusals:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "none.json"
        with refused(f"cannot read the policy {path}: No such file or directory."):
            PolicyFile.read(path)

    @pytest.mark.parametrize("content", [b"", b"{", b"pickle", b"\xff\xfe\x00"])
    def test_what_is_not_json_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "policy.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not JSON: .*\\.$"):
            PolicyFile.read(path)

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ({"name": "a package"}, "not a policy file: the file: 'format' is a required property."),
            ([1, 2], "not a policy file: the file: [1, 2] is not of type 'object'."),
            (None, "not a policy file: the file: None is not of type 'object'."),
        ],
    )
    def test_json_of_something_else_is_named(self, tmp_path: Path, values: Any, sentence: str) -> None:
        path = tmp_path / "package.json"
        path.write_text(json.dumps(values))
        with refused(f"{path}: {sentence}"):
            PolicyFile.read(path)

    @pytest.mark.parametrize(
        ("part", "value", "sentence"),
        [
            ("format", 3, "it is of format 3, and this version reads formats 1 and 2."),
            (
                "extra",
                1,
                "not a policy file: the file: Additional properties are not allowed ('extra' was unexpected).",
            ),
            ("policy", 3, "not a policy file: policy: 3 is not of type 'object'."),
            ("policy", {}, "not a policy file: policy: 'kind' is a required property."),
            ("policy", {"kind": "nope"}, UNKNOWN),
            ("policy", {"kind": "max_age", "max_age": 3, "policy": {"kind": "nope"}}, UNKNOWN),
            ("policy", {"kind": "fixed_stride"}, "not a policy file: policy: 'stride' is a required property."),
            (
                "policy",
                {"kind": "max_age", "max_age": 3, "policy": {"kind": "fixed_stride"}},
                "not a policy file: policy/policy: 'stride' is a required property.",
            ),
            (
                "policy",
                {"kind": "fixed_stride", "stride": 3, "strid": 3},
                "not a policy file: policy: Additional properties are not allowed ('strid' was unexpected).",
            ),
            (
                "policy",
                {"kind": "max_age", "max_age": 3, "policy": 7},
                "not a policy file: policy/policy: 7 is not of type 'object'.",
            ),
            ("policy", {"kind": "fixed_stride", "stride": 0}, "stride must be at least 1, not 0."),
            (
                "policy",
                {"kind": "fixed_stride", "stride": [[1, 2], [3]]},
                "stride must be one number, or a table with one row per layer and one column per KV head, "
                "not ((1, 2), (3,)).",
            ),
            (
                "policy",
                {"kind": "fixed_stride", "stride": [[4, 4]]},
                "the policy is for 1 layers x 2 KV heads, but tiny has 2 layers x 3 KV heads.",
            ),
            (
                "selection",
                {"k": 20},
                "k must hold the sinks and the window: k is 20, but sinks and window need 4 + 32 = 36 tokens.",
            ),
            ("selection", {}, "not a policy file: selection: 'k' is a required property."),
            (
                "selection",
                {"k": 64, "group": "median"},
                "not a policy file: selection/group: 'median' is not one of ['max', 'mean', 'layer_mean'].",
            ),
            (
                "selection",
                {"k": 64, "unit_k": [[64, 64]]},
                "the selection is for 1 layers x 2 KV heads, but tiny has 2 layers x 3 KV heads.",
            ),
            (
                "selection",
                {"k": 64, "unit_k": [[64, 64, 64], [64, 64, 65]]},
                "unit_k must have a mean of at most k, and 64.16666667 is above 64.",
            ),
            (
                "selection",
                {"k": 64, "unit_k": 64},
                "not a policy file: selection/unit_k: 64 is not of type 'array', 'null'.",
            ),
            ("model", {"id": "tiny"}, "not a policy file: model: 'layers' is a required property."),
            ("provenance", 3, "not a policy file: provenance: 3 is not of type 'object'."),
            (
                "provenance",
                {"written_by": 0.2},
                "not a policy file: provenance/written_by: 0.2 is not of type 'string'.",
            ),
        ],
    )
    def test_a_wrong_part_is_named_with_the_file(
        self, file: PolicyFile, tmp_path: Path, part: str, value: Any, sentence: str
    ) -> None:
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(file.to_json() | {part: value}))
        with refused(f"{path}: {sentence}"):
            PolicyFile.read(path)

    @pytest.mark.parametrize("part", ["format", "policy", "selection", "model"])
    def test_a_missing_part_is_named(self, file: PolicyFile, part: str) -> None:
        values = {name: value for name, value in file.to_json().items() if name != part}
        with refused(f"not a policy file: the file: '{part}' is a required property."):
            PolicyFile.from_json(values)


class TestBounds:
    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("policy", {"kind": "x" * 100_000}),
            ("policy", {"kind": "fixed_stride", "stride": 1e300}),
            ("policy", {"kind": "fixed_stride", "stride": 4, "y" * 100_000: 1}),
            ("policy", {"kind": "fixed_stride", "stride": ["z" * 100_000]}),
            ("policy", {"kind": "learned_logistic", "features": ["f" * 999], "weights": [1], "intercept": 0}),
            ("selection", {"k": 10**400}),
            ("selection", {"k": 10**15}),
            ("selection", {"k": float("inf")}),
            ("model", {"id": "m" * 100_000, "layers": 0, "kv_heads": 1, "query_heads": 1, "head_dim": 1}),
            ("model", {"id": "m", "layers": 10**12, "kv_heads": 1, "query_heads": 1, "head_dim": 1}),
            ("model", {"id": "m", "layers": 2.0, "kv_heads": 1, "query_heads": 1, "head_dim": 1}),
            ("provenance", {"result": float("nan")}),
            ("provenance", {"seed": 2**60}),
            ("horizon_steps", -(10**400)),
        ],
    )
    def test_absurd_values_are_refused_in_300_characters(self, file: PolicyFile, part: str, value: Any) -> None:
        with pytest.raises(ValueError, match=r"\.$") as refusal:
            PolicyFile.from_json(file.to_json() | {part: value})
        assert len(str(refusal.value)) <= 300

    def test_policies_that_nest_without_end_are_refused(self, file: PolicyFile) -> None:
        policy: dict[str, Any] = {"kind": "always_full"}
        for _ in range(5000):
            policy = {"kind": "max_age", "max_age": 3, "policy": policy}
        with refused("not a policy file: it is nested deeper than 32 levels."):
            PolicyFile.from_json(file.to_json() | {"policy": policy})

    def test_a_long_path_is_refused_in_300_characters(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot read the policy") as refusal:
            PolicyFile.read(tmp_path.joinpath(*["a" * 200] * 3))
        assert len(str(refusal.value)) <= 300

    def test_a_horizon_in_a_file_of_format_1_is_kept(self, file: PolicyFile) -> None:
        assert PolicyFile.from_json(file.to_json() | {"format": 1, "horizon_steps": 7}).horizon_steps == 7


class TestModel:
    def test_a_policy_of_another_shape_makes_no_file(self, model: ModelShape) -> None:
        with refused("the policy is for 1 layers x 2 KV heads, but tiny has 2 layers x 3 KV heads."):
            PolicyFile(FixedStride(((2, 3),)), Selection(64), model)
        with refused("the selection is for 3 layers x 1 KV heads, but tiny has 2 layers x 3 KV heads."):
            PolicyFile(AlwaysFull(), Selection(64, unit_k=((64,), (64,), (64,))), model)

    @pytest.mark.parametrize("difference", [{"layers": 3}, {"kv_heads": 6}, {"query_heads": 3}, {"head_dim": 64}])
    def test_a_model_of_another_shape_is_refused_with_both(
        self, file: PolicyFile, model: ModelShape, difference: dict[str, int]
    ) -> None:
        other = dataclasses.replace(model, id="other", **difference)
        with refused(f"the policy was tuned on {model}, but {other} is of another shape."):
            file.check_model(other)
        scalar = PolicyFile(AlwaysFull(), Selection(64), model)
        with refused(f"the policy was tuned on {model}, but {other} is of another shape."):
            scalar.check_model(other)

    def test_a_model_of_the_same_shape_is_accepted_by_any_name(self, file: PolicyFile, model: ModelShape) -> None:
        file.check_model(dataclasses.replace(model, id="the same elsewhere"))

    def test_units_are_layers_by_kv_heads(self, model: ModelShape) -> None:
        assert model.units == (2, 3)
        assert str(model) == "tiny (2 layers x 3 KV heads, 6 query heads of 8)"
