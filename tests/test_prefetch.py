"""Batches read ahead: the same ones in the same order, made while the one before is worked on."""

import threading
from collections.abc import Iterator

import pytest
from networks import OUT, echo_source, network, plain, training

from stepcast.errors import ConfigError
from training.data.prefetch import prefetched
from training.train import Trainer


@pytest.mark.parametrize("ahead", [0, 1, 3, 20])
def test_items_come_once_and_in_order(ahead: int) -> None:
    """Fewer of them than are read ahead, more of them, and none."""
    assert list(prefetched(iter(range(7)), ahead)) == list(range(7))
    assert list(prefetched(iter(()), ahead)) == []


def test_the_next_item_is_made_while_one_is_worked_on() -> None:
    """By a thread that is not the caller's; without reading ahead, nothing is made until it is asked for."""
    made, makers = [threading.Event() for _ in range(3)], set()

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            makers.add(threading.get_ident())
            event.set()
            yield number

    ahead = prefetched(items(), 1)
    assert next(ahead) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    assert list(ahead) == [1, 2]
    assert threading.get_ident() not in makers
    for event in made:
        event.clear()
    asked = prefetched(items(), 0)
    assert next(asked) == 0
    assert not made[1].is_set()


def test_an_error_comes_where_it_happened_and_no_thread_outlives_its_reader() -> None:
    """Items before the error are given; a caller that stops early leaves nothing behind."""

    def items() -> Iterator[int]:
        yield 1
        raise ConfigError("a bad file")

    reader = prefetched(items(), 2)
    assert next(reader) == 1
    with pytest.raises(ConfigError, match="a bad file"):
        next(reader)
    stopped = prefetched(iter(range(100)), 2)
    assert next(stopped) == 0
    stopped.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_training_is_bit_for_bit_the_same() -> None:
    """Three epochs of the real trainer, batches shuffled anew in each."""

    def weights(prefetch: int) -> list[list[float]]:
        net = network([{"kind": "lstm", "units": 3}, OUT], plain(1), outputs=1)
        Trainer(net, echo_source(), training(epochs=3, prefetch=prefetch)).fit()
        return [p.flatten().tolist() for p in net.parameters()]

    assert weights(0) == weights(2)
