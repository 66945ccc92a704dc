"""Judges behind an endpoint (a stub on this machine) and by likelihood (a tiny model)."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from lenskit.concepts import Concept, concepts, question_prompt
from lenskit.scoring import Verdict, cohen_kappa, endpoint_judge, likelihood_judge
from lenskit.scoring import endpoint as endpoint_module
from lenskit.scoring.endpoint import OPENAI, ChatEndpoint, _key
from lenskit.scoring.judges import RUBRIC, BudgetSpent, EndpointError, answer_likelihoods
from tests.tiny import reference_model, shared_folder, shared_model

KEY = "sk-secret-0123456789"
SPIDERS = Concept("Personify someone who is terrified of spiders.", "spiders", "fears")
QUESTION = "What frightens you?"


@dataclass
class Drip:
    """A response that goes on for ever, some bytes at a time; ``ended`` once nobody listens."""

    head: bytes
    again: bytes = b" "
    ended: threading.Event = field(default_factory=threading.Event)

    def send(self, out) -> None:
        try:
            out.write(self.head)
            while True:
                out.write(self.again)
                out.flush()
                time.sleep(0.01)
        except OSError:
            self.ended.set()


class Stub:
    """A chat endpoint that answers with what ``plan`` says, in order, and remembers requests.

    A step is a reply text, (status, headers, body), or a number of seconds to say nothing.
    """

    def __init__(self) -> None:
        self.plan: list = []
        self.seen: list[tuple[str, dict, dict]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.seen.append((self.path, dict(self.headers), body))
                step = stub.plan.pop(0) if stub.plan else "1"
                if isinstance(step, float):
                    time.sleep(step)
                    step = "1"
                if isinstance(step, str):
                    step = (200, {}, {"choices": [{"message": {"content": step}}]})
                status, headers, content = step
                drips = isinstance(content, bytes | Drip)
                data = content if drips else json.dumps(content).encode()
                try:
                    if isinstance(content, Drip):
                        content.send(self.wfile)
                        return
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    pass  # it was too late

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def stub(monkeypatch) -> Iterator[Stub]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # to be passed by
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("LENSKIT_JUDGE_KEY", KEY)
    stub = Stub()
    thread = threading.Thread(target=stub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(endpoint_module, "sleep", slept.append)
    return slept


def failing(status: int, **headers: str) -> tuple[int, dict, dict]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, {"error": {"message": f"no, and your key is {KEY}"}}


# ---- the endpoint


def test_zero_and_one_become_verdicts(stub):
    judge = endpoint_judge("m", base_url=stub.url + "/")
    stub.plan = ["1", " 0\n"]
    assert judge(SPIDERS, QUESTION, "Webs.") == Verdict(1, "on concept")
    assert judge(SPIDERS, QUESTION, "Nothing.") == Verdict(0, "off concept")
    assert judge.requests == 2


def test_the_request_holds_rubric_texts_and_key(stub):
    endpoint_judge("some-model", base_url=stub.url)(SPIDERS, QUESTION, 'Webs, "big" ones.')
    path, headers, body = stub.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    system, user = body["messages"]
    assert system == {"role": "system", "content": RUBRIC}
    assert user["role"] == "user" and json.loads(user["content"]) == {
        "concept": SPIDERS.prefix,
        "question": QUESTION,
        "answer": 'Webs, "big" ones.',
    }


def test_options_can_be_left_out_and_added(stub):
    options = {"temperature": None, "max_completion_tokens": 5}
    endpoint_judge("m", base_url=stub.url, options=options)(SPIDERS, QUESTION, "Webs.")
    body = stub.seen[0][2]
    assert "temperature" not in body and "max_tokens" not in body
    assert body["max_completion_tokens"] == 5


def test_without_a_key_no_header_is_sent(stub, monkeypatch):
    monkeypatch.delenv("LENSKIT_JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # of another company than the stub's
    endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.")
    assert "Authorization" not in stub.seen[0][1]
    assert _key(OPENAI) == KEY


def test_an_empty_answer_costs_no_request(stub):
    judge = endpoint_judge("m", base_url=stub.url)
    assert judge(SPIDERS, QUESTION, " \n") == Verdict(0, "unfinished")
    assert judge.requests == 0


def test_too_many_requests_waits_as_long_as_the_server_says(stub, waits):
    stub.plan = [failing(429, Retry_After="7"), "1"]
    judge = endpoint_judge("m", base_url=stub.url)
    assert judge(SPIDERS, QUESTION, "Webs.").score == 1
    assert waits == [7.0] and judge.requests == 2


def test_retry_after_may_be_a_date(stub, waits):
    stub.plan = [failing(503, Retry_After=formatdate(time.time() + 50, usegmt=True)), "0"]
    assert endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.").score == 0
    assert 40 < waits[0] <= 50


def test_without_retry_after_the_wait_doubles(stub, waits):
    stub.plan = [failing(500), failing(502), failing(429, Retry_After="soon"), "1"]
    judge = endpoint_judge("m", base_url=stub.url, backoff=0.5)
    assert judge(SPIDERS, QUESTION, "Webs.").score == 1
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "said",
    ["-5", "nan", "-inf", "", "later", "\xff", "Wed, 99 Foo 9999999 99:99:99 GMT", "1e-999x"],
)
def test_a_retry_after_that_says_nothing_leaves_the_wait_to_backoff(stub, waits, said):
    stub.plan = [failing(429, Retry_After=said), "1"]
    assert endpoint_judge("m", base_url=stub.url, backoff=0.5)(SPIDERS, QUESTION, "Webs.").score
    assert waits == [0.5]


def test_a_retry_after_in_the_past_leaves_the_wait_to_backoff(stub, waits):
    stub.plan = [failing(503, Retry_After=formatdate(time.time() - 50, usegmt=True)), "1"]
    assert endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.").score
    assert waits == [1.0]


@pytest.mark.parametrize("said", ["1e999", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_huge_retry_after_gives_up_at_once(stub, waits, said):
    stub.plan = [failing(429, Retry_After=said)]
    with pytest.raises(EndpointError, match="later than longest_wait=120"):
        endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.")
    assert waits == []


OK = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize(
    "drip",
    [
        Drip(OK + b"\r\n{"),
        Drip(OK + b"X-A: "),
        Drip(OK, b"X-A: a\r\n"),
        Drip(b"HTTP/1.1 429 x\r\n\r\n"),
    ],
    ids=["body", "one header", "many headers", "error"],
)
def test_a_server_that_drips_is_left_at_the_deadline(stub, waits, drip):
    stub.plan = [(200, {}, drip)]
    judge = endpoint_judge("m", base_url=stub.url, timeout=0.3, retries=0)
    with pytest.raises(EndpointError, match="gave no answer"):
        judge(SPIDERS, QUESTION, "Webs.")


@pytest.mark.parametrize("status", [200, 400])
def test_no_more_of_a_body_is_read_than_a_verdict_can_be(stub, status):
    line = f"HTTP/1.0 {status} x\r\n\r\n".encode()
    stub.plan = [(200, {}, endless := Drip(line, b"x" * 100_000))]
    with pytest.raises(EndpointError, match="answered with more than 1,048,576|answered 400: xxx"):
        endpoint_judge("m", base_url=stub.url, timeout=30.0)(SPIDERS, QUESTION, "Webs.")
    assert endless.ended.wait(10)


def test_a_body_that_is_cut_is_asked_for_again(stub, waits):
    stub.plan = [(200, {"Content-Length": "999"}, b'{"choices"'), "1"]
    assert endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.").score == 1
    assert len(waits) == 1


def test_it_gives_up_after_its_retries(stub, waits):
    stub.plan = [failing(500)] * 3
    judge = endpoint_judge("m", base_url=stub.url, retries=2)
    with pytest.raises(EndpointError, match=r"answered 500: .*attempts: 3"):
        judge(SPIDERS, QUESTION, "Webs.")
    assert judge.requests == 3 and len(waits) == 2


def test_it_gives_up_at_once_when_the_wait_is_too_long(stub, waits):
    stub.plan = [failing(429, Retry_After="3600")]
    judge = endpoint_judge("m", base_url=stub.url)
    with pytest.raises(EndpointError, match="in 3600 s, later than longest_wait=120"):
        judge(SPIDERS, QUESTION, "Webs.")
    assert waits == []


def test_a_timeout_is_tried_again(stub, waits):
    stub.plan = [2.5, "0"]
    judge = endpoint_judge("m", base_url=stub.url, timeout=2.0)
    assert judge(SPIDERS, QUESTION, "Webs.").score == 0
    assert judge.requests == 2 and len(waits) == 1


def test_a_server_that_never_answers_in_time_is_an_error(stub, waits):
    stub.plan = [0.5, 0.5]
    judge = endpoint_judge("m", base_url=stub.url, timeout=0.1, retries=1)
    with pytest.raises(EndpointError, match="gave no answer in 0.1 s"):
        judge(SPIDERS, QUESTION, "Webs.")


def test_a_server_that_is_not_there_is_an_error_after_the_retries(stub, waits):
    judge = endpoint_judge("m", base_url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(EndpointError, match="gave no answer"):
        judge(SPIDERS, QUESTION, "Webs.")
    assert len(waits) == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_other_errors_are_not_tried_again(stub, waits, status):
    stub.plan = [failing(status)]
    judge = endpoint_judge("m", base_url=stub.url)
    with pytest.raises(EndpointError, match=f"answered {status}: .*no, and your key is"):
        judge(SPIDERS, QUESTION, "Webs.")
    assert judge.requests == 1 and waits == []


@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_redirect_is_not_followed(stub, status):
    stub.plan = [(status, {"Location": stub.url + "/elsewhere"}, b"")]
    with pytest.raises(EndpointError, match=f"answered {status}.*it redirects"):
        endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.")
    assert len(stub.seen) == 1


@pytest.mark.parametrize("reply", ["", "2", "yes", "Score: 1", "1.", "01", "0 1", "１"])
def test_only_a_single_zero_or_one_is_a_verdict(stub, tmp_path, reply):
    stub.plan = [reply]
    judge = endpoint_judge("m", base_url=stub.url, cache=tmp_path)
    with pytest.raises(EndpointError, match="'m' must reply 0 or 1, but replied"):
        judge(SPIDERS, QUESTION, "Webs.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b"[]",
        b'{"choices": [{"message": {"content": null}}]}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_completion_is_an_error(stub, body):
    stub.plan = [(200, {}, body)]
    with pytest.raises(EndpointError, match="did not answer with the text of a chat completion"):
        endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.")


def test_a_cached_verdict_costs_nothing(stub, tmp_path):
    stub.plan = ["1"]
    endpoint_judge("m", base_url=stub.url, cache=tmp_path)(SPIDERS, QUESTION, "Webs.")
    again = endpoint_judge("m", base_url=stub.url, cache=tmp_path, max_requests=0)
    assert again(SPIDERS, QUESTION, "Webs.") == Verdict(1, "on concept")
    assert len(stub.seen) == 1
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert kept["reply"] == "1" and kept["body"] == stub.seen[0][2]


@pytest.mark.parametrize("change", ["answer", "question", "concept", "model", "rubric", "options"])
def test_whatever_is_asked_otherwise_is_not_in_the_cache(stub, tmp_path, change):
    settings = {"base_url": stub.url, "cache": tmp_path}
    endpoint_judge("m", **settings)(SPIDERS, QUESTION, "Webs.")
    if change in ("rubric", "options"):
        settings[change] = {"rubric": "Say 0 or 1.", "options": {"temperature": 1}}[change]
    concept = Concept("Take on a calm mood.") if change == "concept" else SPIDERS
    endpoint_judge("other" if change == "model" else "m", **settings)(
        concept,
        "Why?" if change == "question" else QUESTION,
        "Legs." if change == "answer" else "Webs.",
    )
    assert len(stub.seen) == 2


def test_a_damaged_cache_file_is_asked_for_again(stub, tmp_path):
    judge = endpoint_judge("m", base_url=stub.url, cache=tmp_path)
    judge(SPIDERS, QUESTION, "Webs.")
    (file,) = tmp_path.iterdir()
    for damage in ("", "[1]", '{"reply": "maybe"}', "[" * 100_000):
        file.write_text(damage)
        assert judge(SPIDERS, QUESTION, "Webs.").score == 1
    assert judge.requests == 5 and json.loads(file.read_text())["reply"] == "1"
    assert [f.suffix for f in tmp_path.iterdir()] == [".json"]


def test_half_a_surrogate_pair_costs_no_paid_answer(stub, tmp_path):
    judge = endpoint_judge("m", base_url=stub.url, cache=tmp_path)
    for _ in range(2):
        assert judge(SPIDERS, QUESTION, "Webs \ud83d and \U0001f577").score == 1
    assert judge.requests == 1 and len(list(tmp_path.glob("*.json"))) == 1
    sent = json.loads(stub.seen[0][2]["messages"][1]["content"])
    assert sent["answer"] == "Webs \ufffd and \U0001f577"
    stub.plan = ["\ud83d"]
    with pytest.raises(EndpointError, match=r"replied .*ud83d"):
        judge(SPIDERS, QUESTION, "Legs.")


@pytest.mark.parametrize("name", ["model", "messages", "stream"])
def test_options_cannot_replace_what_is_asked(name):
    with pytest.raises(ValueError, match=f"options must not hold {name}"):
        endpoint_judge("m", options={"temperature": 0, name: None})


def test_what_identifies_a_judge_is_what_decides_its_verdicts(monkeypatch, tmp_path):
    def known(**changes):
        return endpoint_judge("m", **changes).identity

    monkeypatch.setenv("LENSKIT_JUDGE_KEY", KEY)
    assert known() == known(max_requests=3, cache=tmp_path, timeout=1.0, retries=9)
    for change in ({"rubric": "Say 0."}, {"options": {"temperature": 1}}, {"base_url": "http://h"}):
        assert known() != known(**change)
    assert known() != endpoint_judge("other").identity and KEY not in json.dumps(known())
    local = likelihood_judge(shared_model())
    assert local.identity == likelihood_judge(shared_model(), batch_size=1).identity
    assert local.identity != likelihood_judge(shared_model(), threshold=2.0).identity


def test_the_budget_counts_every_attempt(stub, waits):
    stub.plan = ["1", failing(500), "1"]
    judge = endpoint_judge("m", base_url=stub.url, max_requests=2)
    judge(SPIDERS, QUESTION, "Webs.")
    with pytest.raises(BudgetSpent, match="max_requests=2 is spent"):
        judge(SPIDERS, QUESTION, "Legs.")
    assert len(stub.seen) == 2 and repr(judge).count("2 of 2 requests") == 1


def test_the_key_is_in_no_message_log_cache_or_repr(stub, waits, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    judge = endpoint_judge("m", base_url=stub.url, cache=tmp_path, retries=1)
    stub.plan = [failing(429), "1", failing(401), failing(500), failing(500), f"my key: {KEY}"]
    stub.plan.append((200, {}, {"error": KEY}))
    judge(SPIDERS, QUESTION, "Webs.")
    said = []
    for answer in ("a", "b", "c", "d"):
        with pytest.raises(EndpointError) as caught:
            judge(SPIDERS, QUESTION, answer)
        said.append(str(caught.value))
        assert caught.value.__cause__ is None
    assert sum("[key]" in text for text in said) == 4
    assert "trying again" in caplog.text and "[key]" in caplog.text
    kept = "".join(file.read_text() for file in tmp_path.iterdir())
    held = repr(judge) + repr(vars(judge)) + repr(vars(judge.endpoint))
    assert KEY not in "".join(said) + caplog.text + kept + held


def test_a_key_that_cannot_be_a_header_is_refused_without_being_shown(stub, monkeypatch):
    for bad in ("sk-one\nsk-two", "sk öl", "two words"):
        monkeypatch.setenv("LENSKIT_JUDGE_KEY", bad)
        with pytest.raises(EndpointError) as caught:
            endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.")
        assert "LENSKIT_JUDGE_KEY" in str(caught.value) and bad not in str(caught.value)
    assert stub.seen == []


def test_the_key_is_never_sent_in_the_clear_to_another_machine(monkeypatch):
    monkeypatch.setenv("LENSKIT_JUDGE_KEY", KEY)
    with pytest.raises(EndpointError, match="in the clear to judge.example"):
        endpoint_judge("m", base_url="http://judge.example/v1")(SPIDERS, QUESTION, "Webs.")


@pytest.mark.parametrize(
    "url", ["judge.example/v1", "ftp://x/v1", "https://u:p@x/v1", "https://x/v1?key=1", ""]
)
def test_a_base_url_that_is_none_or_holds_secrets_is_refused(url):
    with pytest.raises(ValueError, match="base_url") as caught:
        ChatEndpoint("m", url)
    assert "u:p" not in str(caught.value)


def test_negative_limits_are_refused():
    with pytest.raises(ValueError, match="must be 0 or more"):
        ChatEndpoint("m", max_requests=-1)
    with pytest.raises(ValueError, match="must be 0 or more"):
        ChatEndpoint("m", retries=-1)


# ---- likelihoods


def logprob(prompt: str, answer: str) -> float:
    """Hugging Face's own log-probability of ``answer`` after the user's ``prompt``, unbatched."""
    tokenizer = shared_model().tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = reference_model(shared_folder())(torch.tensor([start + tail])).logits[0]
    logp = logits[len(start) - 1 : -1].log_softmax(-1)
    return sum(logp[i, token].item() for i, token in enumerate(tail))


def test_likelihoods_are_those_of_whole_answers():
    members = [concepts["fears"]["spiders"], concepts["moods"]["cheerful"], SPIDERS]
    questions = ["What do you fear?", "How are you?", QUESTION]
    answers = ["The library was open on Sundays.", "Rain.", ""]
    found = answer_likelihoods(shared_model(), members, questions, answers, batch_size=2)
    for i in range(2):
        told = logprob(question_prompt(questions[i], members[i].prefix), answers[i])
        plain = logprob(questions[i], answers[i])
        assert found.told[i].item() == pytest.approx(told, abs=1e-3)
        assert found.plain[i].item() == pytest.approx(plain, abs=1e-3)
        assert found.margin[i].item() == pytest.approx(told - plain, abs=1e-3)
        number = len(shared_model().tokenizer(answers[i], add_special_tokens=False)["input_ids"])
        assert len(found.tokens[i]) == number
        assert found.surprise[i].item() == pytest.approx(-told / number, abs=1e-3)
    assert found.margin[2].isnan() and found.surprise[2].isnan()


def test_the_likelihood_judge_compares_margin_and_surprise_with_its_limits():
    answer = "The library was open on Sundays."
    found = answer_likelihoods(shared_model(), [SPIDERS], [QUESTION], [answer])
    margin, surprise = found.margin.item(), found.surprise.item()
    for threshold, most, verdict in (
        (margin - 0.01, surprise + 0.01, Verdict(1, "on concept")),
        (margin + 0.01, surprise + 0.01, Verdict(0, "off concept")),
        (margin - 0.01, surprise - 0.01, Verdict(0, "ill formed")),
    ):
        judge = likelihood_judge(shared_model(), threshold=threshold, most_surprise=most)
        assert judge(SPIDERS, QUESTION, answer) == verdict


def test_many_answers_are_judged_as_one_by_one():
    judge = likelihood_judge(shared_model(), threshold=0.0, most_surprise=9.0, batch_size=2)
    answers = ["Rain is better.", "", "better better better better better", "RainRainRainRainRain"]
    rows = [SPIDERS] * 4, [QUESTION] * 4, answers
    found = judge.batch(*rows)
    assert found == [judge(*row) for row in zip(*rows, strict=True)]
    assert [v.reason for v in found][1:] == ["unfinished", "repeating", "repeating"]
    assert "LlamaForCausalLM" not in repr(judge)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="as many: 1, 2 and 1"):
        likelihood_judge(shared_model()).batch([SPIDERS], [QUESTION] * 2, ["a"])


# ---- agreement


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 3, (40,), generator=generator).tolist()
    b = [x if torch.rand(1, generator=generator) < 0.6 else 1 for x in a]
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_kappa_of_full_of_chance_and_of_no_agreement():
    assert cohen_kappa([0, 1, 1, 0], [0, 1, 1, 0]) == 1
    assert cohen_kappa([0, 0, 1, 1], [0, 1, 0, 1]) == 0
    assert cohen_kappa([0, 1], [1, 0]) == -1
    assert cohen_kappa([1, 1], [1, 1]) != cohen_kappa([1, 1], [1, 1])
    with pytest.raises(ValueError, match="as many labels"):
        cohen_kappa([], [])


def test_nothing_is_written_where_no_cache_is_given(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    endpoint_judge("m", base_url=stub.url)(SPIDERS, QUESTION, "Webs.")
    assert list(Path(tmp_path).iterdir()) == []
