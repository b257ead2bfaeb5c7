"""What is told from one text: damage, language, empty and boilerplate answers, repetition; and from all lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.data.guard.encoding import damage
from llmkit.data.guard.language import LANGUAGES, detect, detect_all
from llmkit.data.guard.quality import common_languages, length_limits, row_faults
from llmkit.data.guard.view import View

FINE = [
    "안녕하세요 반갑습니다 ㅋㅋㅋㅋ ㅠㅠ",
    "今天天气很好，我们去公园吧。",
    "こんにちは世界",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "naïve café déjà vu “quotes” – dash… €5",
    "ÀÉÎÕÜ Ñandú ¿Qué? ¡Olé!",
    "привет мир",
    "5 × 3 ± 2 °",
    "tab\tand\r\nline",
    "",
]
KOREAN = "안녕하세요 반갑습니다 오늘도 좋은 하루"
CHINESE = "今天天气很好我们去公园散步吧"


@pytest.mark.parametrize("text", FINE)
def test_good_text_is_not_damaged(text: str) -> None:
    assert damage(text) == ""


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        (KOREAN, "utf-8", "latin-1"),
        (KOREAN, "utf-8", "cp949"),
        (KOREAN, "cp949", "latin-1"),
        (CHINESE, "utf-8", "gbk"),
        (CHINESE, "gbk", "latin-1"),
        ("café déjà vu", "utf-8", "cp1252"),
        ("it’s “quoted”", "utf-8", "cp1252"),
        ("привет мир", "utf-8", "cp1251"),
        (KOREAN, "cp949", "utf-8"),
    ],
)
def test_text_read_in_the_wrong_character_set_is_damaged(text: str, written: str, read: str) -> None:
    assert damage(text.encode(written).decode(read, "replace"))


@given(st.text(alphabet=st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_korean_text_is_damaged(text: str) -> None:
    assert damage(text) == ""


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("안녕하세요 iPhone 15 Pro 주문하고 싶어요", "ko"),
        ("今天天气很好，我们去公园吧。", "zh"),
        ("今日は天気がいいので公園に行きましょう", "ja"),
        ("The parcel is on its way to you and it will be there soon", "en"),
        ("How do I get to my card?", "en"),
        ("Das Paket ist auf dem Weg und wird bald bei Ihnen sein", "de"),
        ("Le colis est en route et il sera chez vous dans la semaine", "fr"),
        ("El paquete está en camino y no es para la otra semana", "es"),
        ("это не то что я имел в виду и на", "ru"),
        ("สวัสดีครับ", "th"),
        ("Tôi là một người Việt và tôi không biết", "vi"),
        ("product", ""),
        ("270 mm", ""),
        ("def add(a, b): return a + b", ""),
        ("", ""),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert detect(text) == language
    assert language == "" or language in LANGUAGES


def test_many_texts_get_what_each_gets_alone() -> None:
    assert detect_all(FINE) == [detect(text) for text in FINE]
    assert detect_all([]) == []


@pytest.mark.parametrize("answer", ["...", "N/A", "null", "- ", "TODO", "[empty]", "…", "--"])
def test_answers_that_say_nothing(answer: str) -> None:
    assert set(row_faults(View("a question", (answer,)), ["empty"])) == {"empty"}


@pytest.mark.parametrize("answer", ["5", "none", "없음", "无", "👍", "=", "x>0", "No.", "O"])
def test_short_answers_that_say_something(answer: str) -> None:
    assert row_faults(View("a question", (answer,)), ["empty"]) == {}


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I can't browse the web.",
        "I’m sorry, but I cannot help with that.",
        "I cannot assist with that request.",
        "저는 인공지능이라 알 수 없습니다.",
        "죄송하지만 도와드릴 수 없습니다.",
        "作为一个人工智能语言模型，我无法回答。",
        "抱歉，我不能提供这些信息。",
        "申し訳ありませんが、お答えできません。",
    ],
)
def test_boilerplate_answers(answer: str) -> None:
    assert set(row_faults(View("a question", (answer,)), ["boilerplate"])) == {"boilerplate"}
    assert row_faults(View("", (answer,)), ["boilerplate"]) == {}, "a document may say so"


@pytest.mark.parametrize(
    "answer",
    [
        "The AI market grew by 20 %.",
        "I'm sorry to hear that your parcel is late. It will be there tomorrow.",
        "AI 스피커를 추천합니다.",
        "我是你们的老顾客",
        "I can do this: take the train.",
    ],
)
def test_answers_that_only_look_like_boilerplate(answer: str) -> None:
    assert row_faults(View("a question", (answer,)), ["boilerplate"]) == {}


def test_repetition_is_told_from_prose_and_code() -> None:
    prose = " ".join(
        f"Sentence number {n} is about {word}." for n, word in enumerate("alpha beta gamma delta".split() * 8)
    )
    assert row_faults(View("q", (prose,)), ["repetition"]) == {}
    assert set(row_faults(View("q", ("네 " * 300,)), ["repetition"])) == {"repetition"}
    assert row_faults(View("q", ("ha " * 20,)), ["repetition"]) == {}, "a short one may"


def test_every_turn_is_looked_at() -> None:
    assert set(row_faults(View("q", ("...", "a good answer")), ["empty"])) == {"empty"}


def test_length_limits() -> None:
    low, high = length_limits(np.full(100, 200))
    assert low == pytest.approx(50) and high == pytest.approx(800), "a factor of four is always left"
    assert length_limits(np.arange(1, 20)) == (0.0, float("inf")), "too few rows to tell"
    low, high = length_limits(np.random.default_rng(0).lognormal(5, 0.5, 10_000).astype(np.int64))
    assert low < 30 and high > 900


def test_common_languages() -> None:
    codes = np.array([1] * 500 + [2] * 3 + [3] * 20 + [0] * 300, np.uint8)
    assert common_languages(codes) == {1, 3}
