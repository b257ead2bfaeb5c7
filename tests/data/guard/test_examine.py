"""All checks over files: what is planted is named, what is not is left alone, and the rows that go are the right ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data.guard import examine as module
from llmkit.data.guard.findings import found_by_check
from llmkit.data.guard.workers import Pool

OFF = dict.fromkeys(("privacy", "duplicates", "leaks", "contradictions", "quality"))
Check = Callable[..., Any]
Listed = Callable[[str], list[int]]


def only(**part: Any) -> dict[str, Any]:
    return OFF | part


def counts(verdict: Any) -> dict[str, int]:
    return {name: found["rows"] for name, found in found_by_check(verdict.report).items() if found["rows"]}


def test_clean_rows_are_left_alone(check: Check, words: Any) -> None:
    verdict = check(words.rows(200), words.rows(30))
    assert counts(verdict) == {}
    assert verdict.problems == []
    assert not verdict.train[0].dropped.any()


def test_by_default_nothing_is_dropped_and_only_a_leak_is_refused(check: Check, words: Any, listed: Listed) -> None:
    rows, test = words.rows(120), words.rows(20)
    rows[10] = rows[3]
    rows[20] = {**rows[4], "completion": rows[4]["completion"] + " indeed"}
    rows[30] = {**rows[5], "completion": words(30)}
    rows[40]["completion"] = "I'm sorry, but I can't help with that."
    rows[50]["completion"] += " mail kim@corp.co.kr"
    rows[60] = test[7]
    verdict = check(rows, test)
    assert not verdict.train[0].dropped.any()
    assert listed("exact_duplicates") == [11]
    assert listed("near_duplicates") == [21]
    assert listed("contradictions") == [6, 31]
    assert listed("boilerplate") == [41]
    assert listed("privacy") == [51]
    assert listed("leaks") == [61]
    (problem,) = verdict.problems
    assert "1 of 120" in problem
    assert "train.jsonl:61" in problem and "test.jsonl:8" in problem, "both sides by file and line"
    assert "data.guard.leaks.action" in problem


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_the_first_of_a_cluster_is_kept(check: Check, words: Any) -> None:
    rows = words.rows(60)
    rows[20] = rows[30] = rows[5]
    rows[40] = {"prompt": rows[5]["prompt"].upper(), "completion": "  " + rows[5]["completion"]}
    verdict = check(rows, guard=only(duplicates={"action": "drop"}))
    assert np.flatnonzero(verdict.train[0].dropped).tolist() == [20, 30, 40]
    assert verdict.report["dropped"] == {"rows": 3, "by": {"exact_duplicates": 3}}
    assert verdict.report["duplicates"]["largest_groups"][0]["rows"] == 4


def test_a_duplicate_takes_the_place_of_a_first_row_that_another_check_drops(check: Check, words: Any) -> None:
    rows = words.rows(60)
    rows[7]["completion"] += " kim@corp.co.kr"
    rows[9] = {**rows[7], "completion": rows[7]["completion"].replace(" kim@corp.co.kr", "")}
    guard = only(duplicates={"action": "drop"}, privacy={"action": "drop"})
    assert np.flatnonzero(check(rows, guard=guard).train[0].dropped).tolist() == [7]


def test_near_duplicates_in_korean_and_chinese(check: Check, listed: Listed) -> None:
    korean = "오늘 주문한 운동화가 언제 도착하는지 알고 싶습니다 배송 조회가 되지 않아서 문의드립니다"
    chinese = "我想知道昨天下单的运动鞋什么时候可以送到因为物流信息一直没有更新所以来咨询一下"
    rows = [
        {"prompt": korean, "completion": "내일 오후에 도착할 예정입니다 조금만 기다려 주세요 감사합니다 고객님"},
        {"prompt": chinese, "completion": "您好您的包裹预计明天下午送达请您耐心等待谢谢您的理解与支持"},
        {"prompt": korean.replace("싶습니다", "싶어요"), "completion": "내일 오후에 도착할 예정입니다 조금만 기다려 주세요 감사합니다 고객님"},
        {"prompt": chinese.replace("昨天", "前天"), "completion": "您好您的包裹预计明天下午送达请您耐心等待谢谢您的理解与支持"},
        {"prompt": "다른 질문입니다 환불은 어떻게 받을 수 있나요", "completion": "마이페이지에서 신청하실 수 있습니다"},
    ]  # fmt: skip
    check(rows, guard=only(duplicates={}))
    assert listed("near_duplicates") == [3, 4]


def test_rows_with_another_label_are_no_duplicates(check: Check, words: Any, listed: Listed) -> None:
    question = words(40)
    rows = [*words.rows(30), {"prompt": question, "completion": "refund"}]
    rows += [
        {"prompt": question + " now", "completion": "delivery"},
        {"prompt": question + " today", "completion": "refund"},
    ]
    check(rows, guard=only(duplicates={}))
    assert listed("near_duplicates") == [33]


def test_the_instruction_that_all_rows_begin_with_makes_them_no_duplicates(
    check: Check, words: Any, listed: Listed
) -> None:
    instruction = words(100)
    rows = [{"prompt": f"{instruction} {words(2)}", "completion": words(8)} for _ in range(100)]
    check(rows, guard=only(duplicates={}))
    assert listed("near_duplicates") == []
    check(rows, guard=only(duplicates={"near": {"ignore_common": 1.0}}))
    assert len(listed("near_duplicates")) > 90, "the shared instruction is what made them alike"


# --- leaks ----------------------------------------------------------------------------------------------------------


def test_a_test_question_inside_a_longer_document_is_a_leak(check: Check, words: Any, listed: Listed) -> None:
    test = words.rows(30)
    rows = [{"text": words(200)} for _ in range(50)]
    rows[3]["text"] += " " + test[4]["prompt"].title() + "! " + words(50)
    rows[5]["text"] += " " + " ".join(test[6]["prompt"].split()[:8])
    check(rows, test, format="auto")
    assert listed("leaks") == [4], "8 of 20 words are no leak"


def test_chinese_and_korean_questions_are_compared_by_characters(check: Check, words: Any, listed: Listed) -> None:
    chinese = "我想知道昨天下单的运动鞋什么时候可以送到因为物流信息一直没有更新所以来咨询一下"
    korean = "오늘 주문한 운동화가 언제 도착하는지 알고 싶습니다 배송 조회가 되지 않아서 문의드립니다"
    test = [{"prompt": chinese, "completion": "明天"}, {"prompt": korean, "completion": "내일"}]
    rows = words.rows(30)
    rows[2]["completion"] = f"前面还有别的话。{chinese}？后面也有。"
    rows[8]["completion"] = f"앞의 말 {korean.replace(' 알고 ', ' 알고')} 뒤의 말"
    check(rows, test)
    assert listed("leaks") == [3, 9]


def test_what_the_test_set_shares_with_itself_is_its_template(check: Check, words: Any, listed: Listed) -> None:
    opening = words(40)
    test = [{"prompt": f"{opening} {words(20)}", "completion": words(5)} for _ in range(40)]
    rows = [{"prompt": f"{opening} {words(20)}", "completion": words(5)} for _ in range(40)]
    check(rows, test)
    assert listed("leaks") == []


def test_a_short_question_leaks_when_it_is_the_same(check: Check, words: Any, listed: Listed) -> None:
    test = [{"prompt": "Nike shoes 270", "completion": "product"}]
    rows = [
        *words.rows(30),
        {"prompt": "nike  shoes 270", "completion": "brand"},
        {"prompt": "nike shoes", "completion": "a"},
    ]
    check(rows, test)
    assert listed("leaks") == [31]


def test_further_test_sets_are_read_too(check: Check, words: Any, tmp_path: Path, listed: Listed) -> None:
    more = words.rows(5)
    path = tmp_path / "gsm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in more))
    rows = words.rows(30)
    rows[11] = more[2]
    verdict = check(rows, guard=only(leaks={"against": str(path), "action": "drop"}))
    assert np.flatnonzero(verdict.train[0].dropped).tolist() == [11]
    assert verdict.report["leaks"]["test_rows_compared"] == 5
    assert verdict.problems == []


# --- contradictions and quality -------------------------------------------------------------------------------------


def test_contradictions_show_the_answers_without_personal_data(check: Check, words: Any) -> None:
    rows = words.rows(30)
    rows[3] = {"prompt": "Whom do I call?", "completion": "Call kim@corp.co.kr"}
    rows[4] = {"prompt": "whom do I  call?", "completion": "Nobody"}
    rows[5] = {"prompt": "Whom do I call?", "completion": "nobody"}
    verdict = check(rows, guard=only(contradictions="drop"))
    (group,) = verdict.report["contradictions"]["groups"]
    assert [answer["answer"] for answer in group["answers"]] == ["Call <EMAIL>", "Nobody", "nobody"]
    assert np.flatnonzero(verdict.train[0].dropped).tolist() == [3, 4, 5]


def test_quality_names_each_kind_of_bad_row(check: Check, words: Any, listed: Listed) -> None:
    sentence = "The parcel is on its way to you and it will be there in a few days, number {}."
    rows = [{"prompt": f"Where is my parcel number {n}, please?", "completion": sentence.format(n)} for n in range(200)]
    rows[10]["completion"] = "..."
    rows[20]["completion"] = "As an AI language model, I do not have access to parcels."
    rows[30]["completion"] = "on its way " * 60
    rows[40]["completion"] = "The parcel is at the cafÃ© dÃ©jÃ  vu and it will be there for you."
    rows[50]["completion"] = "Das Paket ist auf dem Weg und wird in den nächsten Tagen bei Ihnen sein, das ist sicher."
    rows[60]["completion"] = "The parcel is on its way. " + words(120)
    check(rows, guard=only(quality={}))
    assert {name: listed(name) for name in ("empty", "boilerplate", "repetition", "encoding", "language")} == {
        "empty": [11], "boilerplate": [21], "repetition": [31], "encoding": [41], "language": [51],
    }  # fmt: skip
    assert 61 in listed("length") and 12 not in listed("length")


def test_languages_that_the_recipe_names(check: Check, listed: Listed) -> None:
    rows = [{"prompt": "배송은 언제 되나요?", "completion": "내일 도착할 예정입니다."} for _ in range(10)]
    rows += [{"prompt": "배송은 언제 되나요?", "completion": "The parcel is on its way to you and it is fine."}] * 10
    check(rows, guard=only(quality={"languages": ["ko"], "checks": ["language"]}))
    assert listed("language") == list(range(11, 21))


def test_labels_are_counted(check: Check, words: Any) -> None:
    labels = ["refund"] * 60 + ["delivery"] * 38 + ["brand"] * 2
    rows = [{"prompt": words(6), "completion": label} for label in labels]
    answers = check(rows, guard=only(quality={})).report["quality"]["answers"]
    assert answers["kind"] == "labels"
    assert [(a["answer"], a["rows"]) for a in answers["commonest"]] == [("refund", 60), ("delivery", 38), ("brand", 2)]
    assert answers["rare"] == 1


def test_an_action_that_is_an_error_names_the_first_rows(check: Check, words: Any) -> None:
    rows = words.rows(60)
    rows[3]["completion"] = "..."
    (problem,) = check(rows, guard=only(quality={"action": "error", "checks": ["empty"]})).problems
    assert "data.guard.quality.action" in problem and "train.jsonl:4" in problem


# --- how it is done -------------------------------------------------------------------------------------------------


def test_several_processes_find_what_one_finds(
    check: Check, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, test = words.rows(250), words.rows(20)
    rows[100] = rows[3]
    rows[200] = test[0]
    rows[201]["completion"] += " kim@corp.co.kr"
    monkeypatch.setattr(module, "CHUNK", 30)
    one = check(rows, test)
    lines = (tmp_path / "out" / "guard_rows.jsonl").read_text()
    used: list[int] = []

    def pool(task: Any, count: int) -> Pool:
        used.append(count)
        return Pool(task, 2)

    monkeypatch.setattr(module, "Pool", pool)
    two = check(rows, test)
    assert used == [0]
    assert two.report == one.report
    assert (tmp_path / "out" / "guard_rows.jsonl").read_text() == lines


def test_bad_rows_keep_their_place(check: Check, words: Any, tmp_path: Path) -> None:
    rows: list[Any] = words.rows(10)
    rows[2] = {"prompt": "no answer"}
    rows[6] = rows[5]
    verdict = check(rows, guard=only(duplicates={"action": "drop"}), format="prompt_completion")
    assert verdict.train[0].dropped.tolist() == [n == 6 for n in range(10)]
    assert verdict.report["unusable"]["rows"] == 1 and verdict.problems == []
    assert verdict.train[0].groups is not None and verdict.train[0].groups[2] == -1
    assert verdict.train[0].groups[6] == verdict.train[0].groups[5]


def test_the_files_hold_no_personal_data(check: Check, words: Any, tmp_path: Path) -> None:
    rows = words.rows(30)
    for n in (3, 4):
        rows[n] = {"prompt": "Whom do I call about 880101-1234568?", "completion": f"kim{n}@corp.co.kr"}
    verdict = check(rows)
    assert counts(verdict)["personal_data"] == 2
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*"))
    assert "corp.co.kr" not in written
    assert json.loads((tmp_path / "out" / "guard_report.json").read_text()) == verdict.report


def test_rows_that_are_all_unusable_are_left_to_preparation(check: Check) -> None:
    verdict = check([{"prompt": "no answer"}] * 3, [{"prompt": "a", "completion": "b"}], format="prompt_completion")
    assert verdict.report["rows"] == 0 and verdict.report["unusable"]["rows"] == 3
    assert verdict.problems == [] and len(verdict.train[0].dropped) == 3
