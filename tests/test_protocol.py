"""stepcast.protocol without sockets: both ends of the conversation, alone and against each other."""

from collections import deque
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepcast.protocol import WINDOW_BYTES, WINDOW_STEPS, ClientConversation, Request, ServerConversation, Ticket

pytestmark = pytest.mark.service

# --- the server's side ----------------------------------------------------------------------------------------------


def started(talk: ServerConversation[str, str]) -> list[str]:
    """The requests that may start now."""
    return [ticket.request for ticket in talk.ready]


def finish(talk: ServerConversation[str, str], request: str) -> None:
    """Finish the started ticket of a request."""
    ticket = next(ticket for ticket in talk.ready if ticket.request == request)
    talk.ready.remove(ticket)
    talk.finish(ticket, request.upper())


def test_steps_of_one_session_start_at_once_and_are_answered_in_order() -> None:
    """Their order of application is the batcher's; a later one that is done first waits for its turn."""
    talk = ServerConversation[str, str](limit=8)
    for name in ("a1", "a2", "a3"):
        talk.ask("a", name, step=True)
    assert started(talk) == ["a1", "a2", "a3"]
    finish(talk, "a3")
    finish(talk, "a2")
    assert talk.answers == []
    finish(talk, "a1")
    assert talk.answers == ["A1", "A2", "A3"]
    assert talk.in_flight == 0


def test_sessions_do_not_wait_for_each_other() -> None:
    """An answer of one session is given while another's is out."""
    talk = ServerConversation[str, str](limit=8)
    talk.ask("a", "a1", step=False)
    talk.ask("b", "b1", step=True)
    finish(talk, "b1")
    assert talk.answers == ["B1"]


def test_other_operation_waits_for_earlier_frames_and_holds_later_ones() -> None:
    """step, step, get, step, set, set: each operation alone, in its place."""
    talk = ServerConversation[str, str](limit=8)
    for name in ("s1", "s2", "get", "s3", "set1", "set2"):
        talk.ask("a", name, step=name.startswith("s") and name[1].isdigit())
    assert started(talk) == ["s1", "s2"]
    finish(talk, "s2")
    assert started(talk) == ["s1"]
    finish(talk, "s1")
    assert started(talk) == ["get"]
    finish(talk, "get")
    assert started(talk) == ["s3"]
    finish(talk, "s3")
    assert started(talk) == ["set1"]
    finish(talk, "set1")
    assert started(talk) == ["set2"]
    finish(talk, "set2")
    assert talk.answers == ["S1", "S2", "GET", "S3", "SET1", "SET2"]


def test_step_behind_a_refused_frame_still_waits_for_the_operation_before_it() -> None:
    """A refused frame is no way around an operation that is under way."""
    talk = ServerConversation[str, str](limit=8)
    talk.ask("a", "set", step=False)
    talk.refuse("a", "NO")
    talk.ask("a", "s1", step=True)
    assert started(talk) == ["set"]
    finish(talk, "set")
    assert talk.answers == ["SET", "NO"]
    assert started(talk) == ["s1"]


def test_refusal_takes_its_turn_only_within_its_session() -> None:
    """Without a session it is given at once."""
    talk = ServerConversation[str, str](limit=8)
    talk.ask("a", "a1", step=True)
    talk.refuse("a", "bad")
    talk.refuse(None, "garbage")
    assert talk.answers == ["garbage"]
    finish(talk, "a1")
    assert talk.answers == ["garbage", "A1", "bad"]


def test_marker_is_echoed_when_all_before_it_is_done() -> None:
    """Frames after it do not hold it back, markers keep their order."""
    talk = ServerConversation[str, str](limit=8)
    talk.mark("m0")
    assert talk.answers == ["m0"]
    talk.ask("a", "a1", step=True)
    talk.ask("b", "b1", step=True)
    talk.mark("m1")
    talk.mark("m2")
    talk.ask("b", "b2", step=True)
    finish(talk, "b1")
    assert talk.answers == ["m0", "B1"]
    finish(talk, "a1")
    assert talk.answers == ["m0", "B1", "A1", "m1", "m2"]
    assert talk.in_flight == 1


def test_reading_pauses_at_the_limit_and_goes_on_below_it() -> None:
    """Markers count, refused frames do not stay."""
    talk = ServerConversation[str, str](limit=2)
    talk.ask("a", "a1", step=True)
    talk.refuse("b", "no")
    assert talk.room > 0
    talk.mark("m")
    assert talk.room == 0
    finish(talk, "a1")
    assert talk.room > 0
    assert talk.in_flight == 0


def test_drain_closes_after_the_last_accepted_answer() -> None:
    """What was held back is accepted, too."""
    talk = ServerConversation[str, str](limit=8)
    talk.ask("a", "a1", step=True)
    talk.ask("a", "get", step=False)
    talk.drain()
    assert not talk.close_due
    finish(talk, "a1")
    assert not talk.close_due
    finish(talk, "get")
    assert talk.close_due
    assert talk.answers == ["A1", "GET"]


_FRAMES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["step", "step", "step", "op", "refuse", "mark"])), max_size=40
)


@given(_FRAMES, st.randoms(use_true_random=False))
def test_any_conversation_keeps_its_promises(frames: list[tuple[str, str]], random: Any) -> None:
    """Random frames, finished in random order: each answered once, in order, operations alone, markers in place."""
    talk = ServerConversation[int, int](limit=1000)
    running: dict[str, list[Ticket[int, int]]] = {name: [] for name in "abc"}
    answers: list[int] = []

    def take() -> None:
        while talk.ready:
            ticket = talk.ready.popleft()
            running[frames[ticket.request][0]].append(ticket)
        for tickets in running.values():
            kinds = [frames[ticket.request][1] for ticket in tickets]
            assert kinds in (["op"], ["step"] * len(kinds))
            assert [t.request for t in tickets] == sorted(t.request for t in tickets)
        answers.extend(talk.answers)
        talk.answers.clear()

    def finish_one() -> None:
        open_ = [tickets for tickets in running.values() if tickets]
        if open_:
            tickets = random.choice(open_)
            ticket = tickets.pop(random.randrange(len(tickets)))
            talk.finish(ticket, ticket.request)
            take()

    for i, (session, kind) in enumerate(frames):
        if kind == "refuse":
            talk.refuse(session, i)
        elif kind == "mark":
            talk.mark(i)
        else:
            talk.ask(session, i, kind == "step")
        take()
        if random.random() < 0.4:
            finish_one()
    while talk.in_flight:
        finish_one()
    assert sorted(answers) == list(range(len(frames)))
    for session in "abc":
        of_session = [i for i in answers if frames[i][0] == session and frames[i][1] != "mark"]
        assert of_session == sorted(of_session)
    for i, (_, kind) in enumerate(frames):
        if kind == "mark":
            assert set(range(i)) <= set(answers[: answers.index(i)])


# --- the client's side ----------------------------------------------------------------------------------------------


def step(session: str, x: int, answer_bytes: int | None = 8) -> Request:
    """A step whose input is `x`."""
    return Request(session, "step", {"inputs": [x]}, 1, answer_bytes)


def opened(session: str = "a", at: int = 0) -> ClientConversation:
    """A connected client that knows the session's step."""
    talk = ClientConversation()
    talk.connect()
    talk.ask(Request(session, "info", {}))
    talk.receive({"id": talk.outgoing.popleft()["id"], "step": at})
    talk.done.clear()
    return talk


def sent(talk: ClientConversation) -> list[tuple[int, Any]]:
    """Number and input of the steps to be sent; they are taken."""
    frames, talk.outgoing = list(talk.outgoing), deque()
    return [(frame["seq"], frame["inputs"][0]) for frame in frames if frame["op"] == "step"]


def test_client_asks_for_the_number_before_its_first_step() -> None:
    """The info is its own affair: the caller sees the step's answer only."""
    talk = ClientConversation()
    talk.ask(step("a", 7))
    assert not talk.outgoing
    talk.connect()
    info = talk.outgoing.popleft()
    assert (info["op"], info["session"]) == ("info", "a")
    assert not talk.outgoing
    talk.receive({"id": info["id"], "step": 41})
    frame = talk.outgoing.popleft()
    assert (frame["seq"], frame["inputs"]) == (42, [7])
    talk.receive({"id": frame["id"], "step": 42})
    assert [request.answer["step"] for request in talk.done if request.answer] == [42]


def test_client_starts_a_session_that_does_not_exist_at_one() -> None:
    """session_not_found is no problem of the caller's step."""
    talk = ClientConversation()
    talk.connect()
    talk.ask(step("a", 7))
    problem = {"code": "session_not_found", "status": 404}
    talk.receive({"id": talk.outgoing.popleft()["id"], "error": problem})
    assert sent(talk) == [(1, 7)]
    assert not talk.done


def test_client_keeps_no_more_in_flight_than_the_server_keeps_answers() -> None:
    """By number, by bytes, and one alone where the size is not known."""
    talk = opened()
    for x in range(WINDOW_STEPS + 4):
        talk.ask(step("a", x))
    assert len(sent(talk)) == WINDOW_STEPS
    for size, want in ((WINDOW_BYTES // 3, 3), (WINDOW_BYTES * 2, 1), (None, 1)):
        talk = opened()
        for x in range(5):
            talk.ask(step("a", x, size))
        assert len(sent(talk)) == want


def test_client_resends_what_was_not_acknowledged_with_the_same_numbers() -> None:
    """After the second of four answers the socket breaks; late answers of the old socket are not looked at."""
    talk = opened()
    for x in range(4):
        talk.ask(step("a", x))
    ids = [frame["id"] for frame in talk.outgoing]
    assert sent(talk) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    talk.receive({"id": ids[0], "step": 1})
    talk.receive({"id": ids[1], "step": 2})
    talk.lose()
    talk.ask(step("a", 4))
    assert not talk.outgoing
    talk.connect()
    again = [frame["id"] for frame in talk.outgoing]
    assert sent(talk) == [(3, 2), (4, 3), (5, 4)]
    talk.receive({"id": ids[2], "step": 3})
    assert len(talk.done) == 2
    for number, i in enumerate(again, 3):
        talk.receive({"id": i, "step": number})
        talk.receive({"id": i, "step": number})
    assert [request.fields["inputs"][0] for request in talk.done] == [0, 1, 2, 3, 4]
    assert talk.unanswered == 0


def test_client_holds_back_what_follows_an_operation() -> None:
    """Otherwise a resent `state.set` could undo steps that came after it."""
    talk = opened()
    talk.ask(step("a", 0))
    talk.ask(Request("a", "state.set", {"state": {}}))
    talk.ask(step("a", 1))
    first = talk.outgoing.popleft()
    assert not talk.outgoing
    talk.receive({"id": first["id"], "step": 1})
    operation = talk.outgoing.popleft()
    assert operation["op"] == "state.set"
    assert not talk.outgoing
    talk.receive({"id": operation["id"], "step": 100})
    assert sent(talk) == [(101, 1)]


def test_client_sends_again_after_the_pause_that_the_server_asks_for() -> None:
    """queue_full at the second of three: the gap behind it is not the caller's problem."""
    talk = opened()
    for x in range(3):
        talk.ask(step("a", x))
    ids = [frame["id"] for frame in talk.outgoing]
    assert len(sent(talk)) == 3
    talk.receive({"id": ids[0], "step": 1})
    talk.receive({"id": ids[1], "error": {"code": "queue_full", "status": 429, "retry_after_s": 0.5}})
    talk.receive({"id": ids[2], "error": {"code": "step_conflict", "status": 409, "expected_seq": 2}})
    assert len(talk.done) == 1
    assert talk.pauses == [("a", 0.5)]
    assert not talk.outgoing
    talk.retry("a")
    assert sent(talk) == [(2, 1), (3, 2)]


def test_client_gives_up_on_a_temporary_problem_after_its_tries() -> None:
    """The caller gets the server's problem."""
    talk = ClientConversation(tries=3)
    talk.connect()
    request = Request("a", "state.get", {})
    talk.ask(request)
    for _ in range(3):
        problem = {"code": "store_unavailable", "status": 503}
        talk.receive({"id": talk.outgoing.popleft()["id"], "error": problem})
        talk.retry("a")
    assert talk.done == [request]
    assert request.problem is not None
    assert request.problem["code"] == "store_unavailable"
    assert not talk.outgoing


def test_client_refuses_steps_behind_a_refused_one_until_a_new_start() -> None:
    """The two in flight get the server's word, the one that waited gets ours; a clear starts anew."""
    talk = opened()
    for x in range(2):
        talk.ask(step("a", x, WINDOW_BYTES // 2))
    waiting = step("a", 2)
    talk.ask(waiting)
    talk.ask(Request("a", "clear", {}))
    talk.ask(step("a", 3))
    ids = [frame["id"] for frame in talk.outgoing]
    assert sent(talk) == [(1, 0), (2, 1)]
    talk.receive({"id": ids[0], "error": {"code": "shape_mismatch", "status": 422}})
    talk.receive({"id": ids[1], "error": {"code": "step_conflict", "status": 409, "expected_seq": 1}})
    assert [request.problem["code"] for request in talk.done if request.problem] == [
        "shape_mismatch",
        "step_conflict",
        "step_conflict",
    ]
    assert talk.done[2] is waiting
    clear = talk.outgoing.popleft()
    assert clear["op"] == "clear"
    talk.receive({"id": clear["id"], "step": 0})
    assert sent(talk) == [(1, 3)]


def test_client_ends_a_session_whose_end_was_applied_before_the_socket_broke() -> None:
    """The second end finds no session: that is what was wanted. A first one that finds none is an error."""
    for broken in (True, False):
        talk = opened()
        request = Request("a", "end", {})
        talk.ask(request)
        if broken:
            talk.outgoing.clear()
            talk.lose()
            talk.connect()
        problem = {"code": "session_not_found", "status": 404}
        talk.receive({"id": talk.outgoing.popleft()["id"], "error": problem})
        assert (request.problem is None) == broken
        assert talk.done == [request]


class Replica:
    """The semantics of seq in a few lines: sessions in a dict, the last 16 answers kept, and a real conversation."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def serve(self, talk: ServerConversation[dict[str, Any], dict[str, Any]], full: bool) -> None:
        """Do what is ready; `full`: refuse the first step of it."""
        while talk.ready:
            ticket = talk.ready.popleft()
            frame = ticket.request
            if full and frame["op"] == "step":
                full = False
                answer = {"error": {"code": "queue_full", "status": 429, "retry_after_s": 0.1}}
            else:
                answer = self.answer(frame)
            talk.finish(ticket, {"id": frame["id"], **answer})

    def answer(self, frame: dict[str, Any]) -> dict[str, Any]:
        """Apply a frame once."""
        taken = self.steps.setdefault(frame["session"], [])
        if frame["op"] == "info":
            return {"step": len(taken)}
        seq, x = frame["seq"], frame["inputs"][0]
        if seq == len(taken) + 1:
            taken.append(x)
        elif not (len(taken) - 16 < seq <= len(taken) and taken[seq - 1] == x):
            return {"error": {"code": "step_conflict", "status": 409, "expected_seq": len(taken) + 1}}
        return {"step": seq, "sum": sum(islice(taken, seq))}


_EVENTS = st.lists(
    st.sampled_from(["ask", "ask", "ask", "carry", "answer", "answer", "cut", "full", "retry"]), max_size=80
)


@given(_EVENTS, st.randoms(use_true_random=False))
def test_both_ends_over_a_breaking_line_apply_and_answer_every_step_once(events: list[str], random: Any) -> None:
    """Random loss of the socket, in both directions, and refusals: the server's sequence is the caller's."""
    client, replica = ClientConversation(tries=1000), Replica()
    asked: dict[str, list[int]] = {"a": [], "b": []}
    server = ServerConversation[dict[str, Any], dict[str, Any]](limit=1000)
    client.connect()

    def play(event: str) -> None:
        nonlocal server
        if event == "ask":
            session = random.choice("ab")
            asked[session].append(random.randrange(100))
            client.ask(step(session, asked[session][-1]))
        elif event == "cut":
            client.lose()
            server = ServerConversation(limit=1000)
            client.connect()
        elif event == "retry":
            while client.pauses:
                client.retry(client.pauses.pop()[0])
        elif event == "answer" and server.answers:
            client.receive(server.answers.pop(0))
        elif event in ("carry", "full"):
            while client.outgoing:
                frame = client.outgoing.popleft()
                server.ask(frame["session"], frame, frame["op"] == "step")
            replica.serve(server, event == "full")

    for event in events:
        play(event)
    while client.unanswered:
        for event in ("carry", "answer", "retry"):
            play(event)
    for session, inputs in asked.items():
        assert replica.steps.get(session, []) == inputs
        answers = [r.answer["sum"] for r in client.done if r.session == session and r.answer]
        assert answers == [sum(inputs[: i + 1]) for i in range(len(inputs))]
