"""What threads and interrupts must not do: see ``lenskit.models.use``."""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import weakref

import pytest
import tiny
import torch
from steered import hook_count, random_vectors
from test_capture import prompts_for

from lenskit.capture import capture, for_each_pattern
from lenskit.generation import generate
from lenskit.models import applied_edits, hooked, load_model, rows, using
from lenskit.steering import steer

QUESTIONS = ["What is rain?", "Is the library open on Sundays, or in 1984?"]
WATCHED = ("lenskit/", "transformer_lens/", "torch/nn/modules/module", "torch/utils/hooks")


@pytest.fixture(scope="module")
def model():
    return load_model(tiny.shared_folder(), device="cpu", check="hooks")


def answers(model):
    return [answer.token_ids for answer in generate(model, QUESTIONS, max_new_tokens=6)]


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[0, 40, 50, 60, 70]]), use_cache=False)


def elsewhere(function, *arguments):
    """A thread that runs the function, and what it will have returned."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)), daemon=True)
    thread.start()
    thread.join(0.3)  # long enough to do harm where nothing holds it back
    return thread, results


def test_a_thread_that_only_generates_is_not_steered_by_another(model):
    plain, vectors = answers(model), random_vectors(model)
    with steer(model, vectors, coefficient=30.0):
        steered = answers(model)
        thread, found = elsewhere(answers, model)
        assert answers(model) == steered != plain
    thread.join()
    assert found == [plain]


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_two_threads_capture_as_one_does(model, attention):
    prompts = prompts_for(model)
    expected = capture(model, prompts, progress=False)
    threads, seen = [], {}

    def visit(layer, index, pattern, mask):
        if not threads:
            threads.append(elsewhere(lambda: capture(model, prompts, progress=False)))
        seen[layer] = pattern.float().clone()

    for_each_pattern(model, prompts.tokens, 5, visit, attention=attention, progress=False)
    (thread, found) = threads[0]
    thread.join()
    assert torch.equal(found[0].resid_post, expected.resid_post)
    assert torch.equal(found[0].attention_to_prefix, expected.attention_to_prefix)
    assert sorted(seen) == [0, 1, 2]


def test_a_capture_waits_until_another_thread_no_longer_steers(model):
    prompts = prompts_for(model)
    expected = capture(model, prompts, progress=False)
    with steer(model, random_vectors(model), coefficient=30.0):
        thread, found = elsewhere(lambda: capture(model, prompts, progress=False))
    thread.join()
    assert torch.equal(found[0].resid_post, expected.resid_post)


def test_many_threads_that_capture_and_generate_at_once_agree_with_one(model):
    prompts = prompts_for(model)
    expected, plain = capture(model, prompts, progress=False), answers(model)
    captures, texts = [], []

    def work(number):
        for _ in range(2):
            if number % 2:
                captures.append(capture(model, prompts, progress=False))
            else:
                texts.append(answers(model))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [plain] * 4
    assert all(torch.equal(each.resid_post, expected.resid_post) for each in captures)
    assert len(captures) == 4


def test_one_thread_may_nest_all_uses_and_an_exception_lets_the_model_go(model):
    vectors = random_vectors(model)
    with (
        pytest.raises(KeyError),
        steer(model, vectors, coefficient=1.0),
        steer(model, vectors, coefficient=-1.0),
        using(model),
    ):
        capture(model, prompts_for(model), progress=False)
        answers(model)
        raise KeyError("inside")
    thread, found = elsewhere(answers, model)
    thread.join()
    assert found == [answers(model)]


def test_a_model_is_not_kept_alive():
    model = load_model(tiny.shared_folder(), device="cpu", check=False)
    with steer(model, random_vectors(model), coefficient=1.0):
        answers(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Interrupter:
    """Raises KeyboardInterrupt at the line of clean-up that ``at`` counts to, and ``times`` - 1
    times more, from where it is armed until it is disarmed."""

    def __init__(self, at, times=1):
        self.left, self.times = at, times

    def arm(self):
        frame = sys._getframe(1)
        while frame is not None:
            frame.f_trace = self.call(frame)
            frame = frame.f_back
        sys.settrace(self.call)

    def call(self, frame, event="call", argument=None):
        return self.line if any(part in frame.f_code.co_filename for part in WATCHED) else None

    def line(self, frame, event, argument):
        # A signal is not handled while a lock is let go, although tracing stops there.
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not text.startswith("with "):
            self.left -= 1
            if self.left < 0 and self.times:
                self.times -= 1
                raise KeyboardInterrupt
        return self.line


def use_capture(model, arm):
    def visit(layer, index, pattern, mask):
        if layer == 1:
            arm()

    tokens = prompts_for(model).tokens.rows([0, 1])
    for_each_pattern(model, tokens, 2, visit, blocks=[0, 1], attention="fused", progress=False)


def use_eager(model, arm):
    with hooked(model, [("blocks.2.hook_resid_post", lambda value, hook: None)]):
        logits(model)
        arm()


def use_steer(model, arm):
    with steer(model, random_vectors(model), coefficient=2.0, start=1):
        logits(model)
        arm()


def use_generate(model, arm):
    def end(value, hook):
        if value.shape[1] == 1:
            arm()

    with steer(model, [random_vectors(model)] * 2, coefficient=[1.0, 2.0]):
        with hooked(model, [("blocks.2.hook_resid_post", end)]):
            generate(model, QUESTIONS, max_new_tokens=2)
        assert all(len(each._rows) == 2 for each in applied_edits(model))


@pytest.mark.parametrize("times", [1, 9])
@pytest.mark.parametrize("use", [use_steer, use_eager, use_capture, use_generate])
def test_an_interrupt_at_any_step_of_the_clean_up_leaves_nothing_behind(model, use, times):
    use(model, lambda: None)
    before, hooks = logits(model), hook_count(model)
    modules = [block.original_component.self_attn for block in model.blocks]
    tracing, ended = sys.gettrace(), False
    for step in range(0, 5000, 29 if use is use_generate else 5):
        try:
            use(model, Interrupter(step, times).arm)
            ended = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
        if ended:
            break
        with using(model):
            assert not applied_edits(model)
            assert not rows.reading
            assert hook_count(model) == hooks
            assert not any(point.fwd_hooks for point in model.hook_dict.values())
            assert modules == [block.original_component.self_attn for block in model.blocks]
            assert model.original_model.config._attn_implementation == "eager"
            assert model.context_level == 0
            assert torch.equal(logits(model), before)
        thread, found = elsewhere(lambda: using(model).__enter__())
        thread.join()
        assert len(found) == 1
    assert ended and step > 5


def test_a_setter_that_is_interrupted_is_run_again(model, monkeypatch):
    before, prompts = logits(model), prompts_for(model)
    modules = [block.original_component.self_attn for block in model.blocks]
    original, interrupts = torch.nn.Module.__setattr__, [True, True, False, True]

    def interrupted(self, name, value):
        if any(value is module for module in modules) and interrupts and interrupts.pop():
            raise KeyboardInterrupt
        original(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(model, prompts, attention="fused", progress=False)
    monkeypatch.undo()
    assert not interrupts
    assert modules == [block.original_component.self_attn for block in model.blocks]
    assert torch.equal(logits(model), before)
