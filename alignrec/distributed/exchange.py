"""Rows of tables that are spread over the ranks: ids travel to their owners, rows travel back.

The one communication primitive of graph alignment: neighbour sampling, feature lookup and the
sharded embeddings are all "ask the owner of these ids". An exchange is collective: every rank calls
the same methods in the same order, with as many ids as it likes, none included.
"""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from alignrec.distributed.process_group import Rank
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.errors import StageFailure


class Exchange:
    """All-to-all between the ranks of one process group.

    A thread that exchanges beside the main one needs an exchange with a group of its own
    (``process_group.new_group``); one exchange is not for two threads.

    Attributes:
        rank_index: this rank.
        world_size: number of ranks; with 1 nothing is sent and no process group is needed.
        device: what tensors travel from (the GPU with NCCL, else the CPU); others are copied.
    """

    def __init__(
        self,
        rank: Rank,
        group: dist.ProcessGroup | None = None,
        *,
        roll_call_seconds: float = 10.0,
        before_collective: Beat = unwatched,
    ) -> None:
        """Take part in the exchange; not collective.

        Args:
            rank: this rank.
            group: of all ranks; the default one where it is None.
            roll_call_seconds: after a broken connection, how long the others have to notice it too;
                those that do not are named in the error: gone, or busy with something else.
            before_collective: called before each collective: of ranks that wait for each other, the
                one that never arrives has called it less often.
        """
        self._before_collective = before_collective
        self._roll_call_seconds = roll_call_seconds
        self.rank_index = rank.index
        self.world_size = rank.world_size
        self.device = torch.device("cpu")
        self._group = group
        if self.world_size > 1 and dist.get_backend(group) == "nccl":
            self.device = rank.device

    def send(self, ids: Shaped[Tensor, " n"], owners: Int64[Tensor, " n"]) -> "Route":
        """Send each id to its owner; the route brings the owners' answers back.

        Args:
            ids: what the owners understand, e.g. row numbers; int32 or int64. Equal ids are sent
                as often as they occur: see ``gather_rows`` for asking once.
            owners: rank of each id, in [0, world_size).
        """
        return self.ask(ids, owners).route()

    def ask(self, ids: Shaped[Tensor, " n"], owners: Int64[Tensor, " n"]) -> "Question":
        """Start to send: the caller can do other work before it takes the ``route()``.

        That work also evens out ranks of unequal speed, which ``send`` would make wait.
        """
        if self.world_size == 1:
            return Question(self, ids, None, [len(ids)], None)
        sent = torch.bincount(owners, minlength=self.world_size)
        order = torch.argsort(owners, stable=True)
        ones = [1] * self.world_size
        return Question(
            self,
            ids.index_select(0, order),
            order,
            [int(count) for count in sent.tolist()],
            self.begin_all_to_all(sent, ones, ones),
        )

    def swap_counts(self, counts: Sequence[int]) -> list[int]:
        """Tell every rank one number and return the number that each of them told this one."""
        ones = [1] * self.world_size
        taken = self.all_to_all(torch.tensor(counts, dtype=torch.int64), ones, ones)
        return [int(count) for count in taken.tolist()]

    def all_to_all(
        self, rows: Shaped[Tensor, " n *row"], sent: Sequence[int], taken: Sequence[int]
    ) -> Shaped[Tensor, " m *row"]:
        """Send consecutive blocks of rows to ranks 0, 1, ... and return theirs, in rank order.

        Args:
            rows: ``sent[0]`` rows for rank 0, then ``sent[1]`` for rank 1, and so on.
            sent: number of rows for each rank.
            taken: number of rows from each rank, as it knows them in ``sent``.
        """
        return self.begin_all_to_all(rows, sent, taken).wait()

    def begin_all_to_all(
        self, rows: Shaped[Tensor, " n *row"], sent: Sequence[int], taken: Sequence[int]
    ) -> "Arrival":
        """Start an ``all_to_all``; ``wait()`` for what it returns."""
        if self.world_size == 1:
            return Arrival(self, rows, rows, None, rows.device)
        payload = rows.to(self.device).contiguous()
        result = payload.new_empty((sum(taken), *rows.shape[1:]))
        self._before_collective()
        with self._watching(f"exchanging {len(rows)} rows"):
            work = dist.all_to_all_single(
                result, payload, list(taken), list(sent), group=self._group, async_op=True
            )
        return Arrival(self, result, payload, work, rows.device)

    def sum(self, values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
        """Return the sums of the ranks' values, element by element."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
        """Return the largest of the ranks' values, element by element."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def _all_reduce(self, values: Tensor, operation: Any) -> Tensor:  # noqa: ANN401 - ReduceOp
        if self.world_size == 1:
            return values
        result = values.to(self.device, copy=True)
        self._before_collective()
        with self._watching("reducing values"):
            dist.all_reduce(result, op=operation, group=self._group)
        return result.to(values.device)

    @contextlib.contextmanager
    def _watching(self, action: str) -> Iterator[None]:
        """Turn the error of a broken connection into one that names the ranks that are silent."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            raise StageFailure(
                f"rank {self.rank_index} of {self.world_size} failed while {action}: "
                f"{self._missing_ranks()} ({reason}). Look at the log of that rank, then run the "
                f"same command again: it resumes."
            ) from error

    def _missing_ranks(self) -> str:
        """Call the roll through the store: ranks that live sign, as they meet the same error."""
        keeper = "the launcher" if self.rank_index == 0 else "rank 0"
        no_store = f"{keeper}, which keeps the ranks' common store, does not answer"
        store = dist.distributed_c10d._get_default_store()
        try:
            store.set(_signature(self.rank_index), "1")
        except (RuntimeError, dist.DistError):
            return no_store
        seconds = self._roll_call_seconds
        missing = []
        for other in range(self.world_size):
            if other == self.rank_index or _has_signed(store, other, seconds=seconds):
                continue
            # Without the store nobody has signed, this rank included.
            if not _has_signed(store, self.rank_index, seconds=1):
                return no_store
            missing.append(str(other))
            seconds = 1
        if not missing:
            return "all ranks live, but the connection between them broke"
        # A rank that is busy elsewhere signs no sooner than it exchanges again.
        return (
            f"rank {', '.join(missing)} does not answer within {self._roll_call_seconds:g} s: it "
            f"has ended, hangs, or is busy and has not noticed yet"
        )


@dataclasses.dataclass(frozen=True)
class Arrival:
    """Rows that are under way to this rank.

    Attributes:
        result: where they arrive.
        payload: what this rank sends, which must live as long.
        work: of torch.distributed; None when nothing travels.
        device: where the caller wants them.
    """

    exchange: Exchange
    result: Tensor
    payload: Tensor
    work: dist.Work | None
    device: torch.device

    def wait(self) -> Tensor:
        """Return the rows once they are here; a rank that does not answer is named."""
        if self.work is not None:
            with self.exchange._watching(f"waiting for {len(self.result)} rows"):
                self.work.wait()
        return self.result.to(self.device)


@dataclasses.dataclass(frozen=True)
class Question:
    """Ids that go to their owners in two steps: first how many, then which.

    Attributes:
        ids: by owner.
        order: places of ``ids`` in what the caller gave; None when nothing travels.
        sent: number of ids for each rank.
        counts: number from each rank, under way.
    """

    exchange: Exchange
    ids: Shaped[Tensor, " n"]
    order: Int64[Tensor, " n"] | None
    sent: list[int]
    counts: Arrival | None

    def route(self) -> "Route":
        """Send the ids and wait for those of the others; collective."""
        if self.counts is None:
            return Route(self.exchange, self.ids, None, self.sent, self.sent)
        taken = [int(count) for count in self.counts.wait().tolist()]
        received = self.exchange.all_to_all(self.ids, self.sent, taken)
        return Route(self.exchange, received, self.order, self.sent, taken)


@dataclasses.dataclass(frozen=True)
class Route:
    """The way of one batch of ids to their owners, and back.

    Attributes:
        received: ids that the ranks ask of this one, by asking rank; what is answered must be
            aligned with them.
        sent: number of ids that went to each rank.
        taken: number of ids that came from each rank.
    """

    exchange: Exchange
    received: Shaped[Tensor, " m"]
    order: Int64[Tensor, " n"] | None
    sent: list[int]
    taken: list[int]

    def reply(self, rows: Shaped[Tensor, " m *row"]) -> Shaped[Tensor, " n *row"]:
        """Return the owners' rows, aligned with the ids that this rank sent.

        Differentiable: the backward pass carries the gradients of the rows back to their owners,
        where they arrive at ``rows``. It is collective as well, so every rank must call backward
        on something that depends on the reply, also a rank that asked for nothing. A trainer may
        prefer to cut the graph at the reply and call ``send_back`` itself.
        """
        if not rows.requires_grad:
            return self._back(rows)
        result: Tensor = _Reply.apply(rows, self)  # type: ignore[no-untyped-call]
        return result

    def begin_reply(self, rows: Shaped[Tensor, " m *row"]) -> Arrival:
        """Start to reply; the rows arrive by owner: ``by_owner`` tells for which ids they are."""
        return self.exchange.begin_all_to_all(rows, self.taken, self.sent)

    def by_owner(self, values: Shaped[Tensor, " n *row"]) -> Shaped[Tensor, " n *row"]:
        """Put values that are aligned with the ids that this rank sent in the order of owners."""
        return values if self.order is None else values.index_select(0, self.order)

    def reply_ragged(
        self, lengths: Int64[Tensor, " m"], *values: Shaped[Tensor, " k"]
    ) -> tuple[Tensor, ...]:
        """Answer each id with a list of its own length.

        Args:
            lengths: length of the list of each received id.
            *values: the lists one after another; several tensors are parallel lists.

        Returns:
            lengths (n,) and values, aligned with the ids that this rank sent.
        """
        if self.order is None:
            return (lengths, *values)
        ends = torch.cumsum(lengths, 0)
        sizes = _block_sums(ends, self.taken)
        counts = self.exchange.all_to_all(lengths, self.taken, self.sent)
        starts = torch.cumsum(counts, 0) - counts
        wanted = _block_sums(starts + counts, self.sent)
        back = _inverse(self.order)
        picked = ragged_index(starts[back], counts[back])
        arrived = [self.exchange.all_to_all(value, sizes, wanted) for value in values]
        return (counts[back], *(value.index_select(0, picked) for value in arrived))

    def send_back(self, rows: Shaped[Tensor, " n *row"]) -> Shaped[Tensor, " m *row"]:
        """Send one row for each id to its owner, e.g. gradients; the result fits ``received``."""
        if self.order is None:
            return rows
        return self.exchange.all_to_all(rows.index_select(0, self.order), self.sent, self.taken)

    def _back(self, rows: Tensor) -> Tensor:
        if self.order is None:
            return rows
        arrived = self.exchange.all_to_all(rows, self.taken, self.sent)
        result = torch.empty_like(arrived)
        result[self.order] = arrived
        return result


class _Reply(torch.autograd.Function):
    """``Route.reply`` whose backward is ``Route.send_back``."""

    @staticmethod
    def forward(context: Any, rows: Tensor, route: Route) -> Tensor:  # noqa: ANN401
        context.route = route
        return route._back(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return context.route.send_back(gradient), None


def gather_rows(
    exchange: Exchange,
    ids: Int64[Tensor, " n"],
    owner_of: Callable[[Int64[Tensor, " u"]], Int64[Tensor, " u"]],
    read: Callable[[Int64[Tensor, " m"]], Shaped[Tensor, " m *row"]],
) -> Shaped[Tensor, " n *row"]:
    """Look up a row for each id, asking for each distinct id once.

    Differentiable in what ``read`` returns (see ``Route.reply``): gradients of equal ids are
    summed before they travel.

    Args:
        exchange: between the ranks.
        ids: global ids, equal ones allowed.
        owner_of: global ids -> rank.
        read: global ids that this rank owns -> their rows.
    """
    distinct, position = torch.unique(ids, return_inverse=True)
    route = exchange.send(distinct, owner_of(distinct))
    return route.reply(read(route.received)).index_select(0, position)


def sums_by_row(
    rows: Int64[Tensor, " m"], gradients: Float[Tensor, "m dim"], *, at_once: int
) -> Iterator[tuple[Int64[Tensor, " u"], Float[Tensor, "u dim"]]]:
    """Add up the gradients of equal rows, as several ranks may have sent.

    Ascending rows in small blocks: what is done to a block finds it in the processor's cache, and
    the tables that it goes to in the order in which they lie in memory.

    Args:
        rows: of a table, in any order.
        gradients: of each.
        at_once: distinct rows in a block.

    Yields:
        The next distinct rows, ascending, and the sum of each one's gradients.
    """
    distinct, position = torch.unique(rows, return_inverse=True)
    order = torch.argsort(position, stable=True)
    ends = torch.bincount(position, minlength=len(distinct)).cumsum(0)
    first = 0
    for start in range(0, len(distinct), at_once):
        block = distinct[start : start + at_once]
        last = int(ends[start + len(block) - 1])
        chosen = order[first:last]
        total = gradients.index_select(0, chosen)
        if len(chosen) > len(block):  # several ranks sent some of the rows
            places = position.index_select(0, chosen) - start
            total = total.new_zeros((len(block), *total.shape[1:])).index_add_(0, places, total)
        yield block, total
        first = last


def _signature(rank_index: int) -> str:
    return f"alignrec/alive/{rank_index}"


def _has_signed(store: Any, rank_index: int, *, seconds: float) -> bool:  # noqa: ANN401 - Store
    """Wait for a rank's signature; False where it does not come, or the store is gone."""
    try:
        store.wait([_signature(rank_index)], datetime.timedelta(seconds=seconds))
    except (RuntimeError, dist.DistError):
        return False
    return True


def _inverse(order: Tensor) -> Tensor:
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


def _block_sums(ends: Tensor, blocks: Sequence[int]) -> list[int]:
    """Return the sums of consecutive blocks of a list of which ``ends`` is the running sum."""
    padded = torch.cat([ends.new_zeros(1), ends])
    edges = torch.tensor([0, *blocks], device=ends.device).cumsum(0)
    return [int(size) for size in padded[edges].diff().tolist()]


def ragged_index(
    starts: Int64[Tensor, " n"], lengths: Int64[Tensor, " n"]
) -> Int64[Tensor, " total"]:
    """Return the positions of lists that lie at ``starts``, one list after another."""
    offsets = starts - (torch.cumsum(lengths, 0) - lengths)
    total = torch.arange(int(lengths.sum()), device=starts.device)
    return total + torch.repeat_interleave(offsets, lengths)
