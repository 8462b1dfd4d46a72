"""Prompts: made from what is installed, or read from a file that is checked line by line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from examples.traffic.chat import DOMAINS, chat_prompts
from examples.traffic.found import functions
from examples.traffic.prompts import (
    Message,
    Prompt,
    PromptError,
    asked,
    by_domain,
    read_prompts,
    write_prompts,
)

FEW = dict.fromkeys(DOMAINS, 40)


@pytest.fixture(scope="module")
def chats():
    return chat_prompts(FEW, seed=0)


def test_every_domain_has_as_many_different_chats_as_asked_for(chats):
    assert list(chats) == list(DOMAINS) and len(DOMAINS) >= 4
    for domain, prompts in chats.items():
        assert len(set(prompts)) == 40
        assert all(p.domain == domain and p.prompt is None for p in prompts)
        assert all(
            p.messages[0].role == "user" and len(p.messages[0].content) > 60 for p in prompts
        )
    every = list(itertools.chain.from_iterable(chats.values()))
    assert len({p.messages[0].content for p in every}) == len(every)


def test_the_seed_fixes_the_chats_and_more_of_them_begin_alike(chats):
    assert chat_prompts(FEW, seed=0) == chats
    assert chat_prompts(FEW, seed=1) != chats
    more = chat_prompts({"code": 60, "summary": 45}, seed=0)
    assert more["code"][:40] == chats["code"]
    assert more["summary"][:40] == chats["summary"]


def test_chats_ask_what_their_domain_says(chats):
    assert all('"""' in p.messages[0].content for p in chats["code"])
    assert all("JSON" in p.messages[0].content for p in chats["extract"])
    assert all("```python\n" in p.messages[0].content for p in chats["explain"])


def test_an_installation_without_enough_text_says_how_much_it_has(monkeypatch, tmp_path):
    (tmp_path / "small.py").write_text("x = 1\n" * 100)
    from examples import corpus

    only = corpus.Source("python", tmp_path, tmp_path / "small.py")
    monkeypatch.setattr(corpus, "sources", lambda domain: (only,))

    with pytest.raises(ValueError, match="holds 0 prompts of domain 'code' and 5 were asked"):
        chat_prompts({"code": 5}, seed=0)
    assert chat_prompts({"code": 5}, seed=0, may_lack=True) == {"code": []}


def test_a_function_is_cut_from_its_file_as_it_stands(monkeypatch, tmp_path):
    source = '''
class Adder:
    async def add(self, a: int, b: int = max(1, 2)) -> int:
        """Add two numbers.

        Both are integers.
        """
        total = a + b

        return total

    def other(self):
        pass
'''
    path = tmp_path / "adder.py"
    path.write_text(source + "# filler\n" * 40)
    from examples import corpus

    monkeypatch.setattr(corpus, "sources", lambda _: (corpus.Source("python", tmp_path, path),))

    [found] = functions(seed=0)

    assert found.name == "add"
    assert found.head == "async def add(self, a: int, b: int = max(1, 2)) -> int:"
    assert found.doc == "Add two numbers.\n\nBoth are integers."
    assert found.body == "    total = a + b\n\n    return total"


def lines_of(folder: Path, *lines: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_prompts_survive_their_file(tmp_path: Path):
    prompts = [
        asked("lines", "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\r\neight"),
        asked("law", "What is a tort?"),
        Prompt(prompt="Once upon", domain="tales", max_tokens=9, temperature=0.3),
        Prompt(messages=(Message(role="system", content="a"), Message(role="user", content="b"))),
    ]
    path = tmp_path / "some.jsonl"

    write_prompts(path, prompts)

    assert read_prompts(path) == prompts
    assert json.loads(path.read_text().split("\n")[2]) == {
        "prompt": "Once upon",
        "domain": "tales",
        "max_tokens": 9,
        "temperature": 0.3,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"promt": "a"}', "promt: unknown field; known: prompt, messages, domain, max_tokens"),
        ('{"domain": "a"}', "give either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "give either 'prompt'"),
        ('{"prompt": ""}', "prompt: string should have at least 1 character"),
        ('{"prompt": 3}', "prompt: input should be a valid string"),
        ('{"prompt": "a", "temperature": 3}', "temperature: input should be less than or equal"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: input should be greater than or equal"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "messages.0.role: input should be"),
        ('{"messages": []}', "messages: tuple should have at least 1 item"),
        ("{", "invalid JSON"),
        ("[1]", "input should be an object"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: str, message: str):
    path = lines_of(tmp_path, '{"prompt": "fine"}', "", line)

    with pytest.raises(PromptError) as caught:
        read_prompts(path)

    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)


def test_a_bad_item_of_a_list_is_the_only_problem_that_is_named(tmp_path: Path):
    with pytest.raises(PromptError, match=r"line 1: messages\.0\.role: [^;]+$"):
        read_prompts(lines_of(tmp_path, '{"messages": [{"role": "tool", "content": "a"}]}'))


@pytest.mark.parametrize("content", [b'\xef\xbb\xbf{"prompt": "a"}\n', b'{"prompt": "a"}\r\n'])
def test_a_file_of_another_system_is_read(tmp_path: Path, content: bytes):
    (tmp_path / "mine.jsonl").write_bytes(content)

    assert read_prompts(tmp_path / "mine.jsonl") == [Prompt(prompt="a")]


def test_files_that_hold_nothing_are_refused(tmp_path: Path):
    with pytest.raises(PromptError, match=r"none\.jsonl: cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(PromptError, match="holds no prompts"):
        read_prompts(lines_of(tmp_path, ""))


def test_equal_prompts_of_a_domain_count_once():
    found = by_domain([asked("b", "1"), asked("a", "1"), asked("b", "1"), asked("b", "2")])

    assert list(found) == ["b", "a"]
    assert found["b"] == [asked("b", "1"), asked("b", "2")]


def test_a_seed_follows_from_text_and_base_alone():
    one, same = asked("law", "hello"), asked("law", "hello")

    assert one.seed(0) == same.seed(0) != one.seed(1)
    assert one.seed(0) != asked("law", "hello!").seed(0)
    assert 0 <= one.seed(0) < 2**31
