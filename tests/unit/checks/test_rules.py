"""The table of rules: complete, explained, and every proof a test that is there."""

import re
from pathlib import Path

import pytest

from finetune_cli.checks.rules import BY_ID, RULES

ROOT = Path(__file__).resolve().parents[3]
ERRORS = {5, 7, 14, 15, 18, 19, 21, 25, 26, 29}
"""Of the contract's list those that are never only a warning."""
SOMETIMES = {1, 2, 9, 10, 16, 30}


def test_ids_are_unique_in_order_and_without_a_gap():
    ids = [rule.id for rule in RULES]
    assert ids == sorted(set(ids))
    assert ids[:33] == [f"FT{n:03}" for n in range(1, 34)]
    assert all(int(name[2:]) > 100 for name in ids[33:])


def test_severities_are_those_of_the_contract():
    numbered = {int(rule.id[2:]): rule for rule in RULES if int(rule.id[2:]) < 100}
    assert {n for n, rule in numbered.items() if rule.error_when} == SOMETIMES
    assert {n for n, rule in numbered.items() if rule.severity == "error"} == ERRORS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_is_checked_or_held_and_says_what_to_do(rule):
    assert rule.checked or (rule.held and rule.proof)
    assert bool(rule.held) == bool(rule.proof)
    assert rule.title
    assert rule.remedy
    assert rule.why.endswith(".")
    assert "—" not in rule.why


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.proof], ids=lambda rule: rule.id)
def test_every_proof_is_a_test_that_is_there(rule):
    file, _, name = rule.proof.partition("::")
    assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M)


def test_explain_lists_all_and_explains_each(monkeypatch, capsys):
    from finetune_cli import commands

    assert commands.explain(None) == 0
    listed = capsys.readouterr().out
    assert all(rule.id in listed for rule in RULES)
    for rule in RULES:
        assert commands.explain(rule.id.lower()) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert " ".join(rule.remedy.split()) in told
        assert (f"ignore: [{rule.id}]" in told) == rule.can_be_ignored


def test_ignoring(of):
    def said(*names):
        return [(p.key, p.message) for p in of("FT110", fast=True, ignore=list(names))]

    assert said("FT016", "FT033", "FT108") == []
    assert said("FT099") == [("ignore[0]", "there is no rule 'FT099'; `finetune explain` lists the rules")]
    assert said("FT016", "ft033")[0] == ("ignore[1]", "there is no rule 'ft033'; did you mean FT033?")
    assert "FT005 is an error" in said("FT005")[0][1]
    assert "FT011 never warns" in said("FT011")[0][1]


def test_what_is_accepted_is_not_told_and_errors_still_are(says):
    rate = {"train": {"learning_rate": 1e-3}}
    assert [p.rule for p in says(fast=True, **rate)] == ["FT016", "FT033"]
    assert says(fast=True, **rate, ignore=["FT016", "FT033"]) == []
    (problem,) = says("learning_rate=0.5", fast=True, ignore=["FT016", "FT033"])
    assert (problem.rule, problem.severity) == ("FT016", "error")


def test_a_rule_is_found_by_its_id():
    assert BY_ID["FT016"].title == "a learning rate that does not fit the method"
